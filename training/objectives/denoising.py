"""The loss that trains a denoising U-Net on captioned pictures, and the validation loss on fixed noise."""

import contextlib
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines import DDPMScheduler, InpaintPipeline, TextToImagePipeline
from pipelines.chain.equations import predict_x0, signal_to_noise_ratio
from pipelines.drawing.loop import pad_channels
from pipelines.drawing.text import NULL_PROMPT
from training.data.caches import LatentCache, LiveText, TextCache, encode_latents
from training.data.pictures import PictureCache, seed_for
from training.objectives.inpainting import random_masks, see_mask
from training.objectives.losses import LOSSES, DiffusionLoss, LossAwareTimesteps, detail_loss, min_snr_weight
from training.run.settings import CaptionSettings, InpaintingSettings, TimestepSettings, require, setting

BUCKETS = 10  # of timesteps; a loss or an accuracy is reported for each


class DenoisingSettings(CaptionSettings, TimestepSettings, InpaintingSettings):
    """The settings of the denoising loss."""

    loss: str = setting("simple or, for a learned variance, hybrid or vlb (Improved DDPM).", "simple", LOSSES)
    random_flip: bool = setting("Mirror half of the pictures.", False)
    caption_dropout: float = setting(
        "How often the caption is replaced by the null prompt.", 0.1, "in [0, 1]"
    )
    snr_gamma: float | None = setting(
        "Min-SNR weighting of all losses but vlb; none for the plain loss.", 5.0, "above 0"
    )
    snr_floor: float = setting("With snr_gamma: lower bound of the ratio.", 0.0)
    detail_weight: float = setting("With snr_gamma: weight of |error of x0| where SNR >= snr_gamma.", 0.0)
    noise_offset: float = setting(
        "Amount of added noise that is constant over each channel.", 0.0, "0 or more"
    )

    def check(self) -> None:
        super().check()
        gamma, floor, detail = self.snr_gamma, self.snr_floor, self.detail_weight
        require(floor == 0 or 0 < floor <= (gamma or 0), "snr_floor", floor, "in [0, snr_gamma]")
        allowed = detail == 0 or (detail > 0 and gamma is not None and self.loss != "vlb")
        require(allowed, "detail_weight", detail, "0, or above 0 with snr_gamma and a loss other than vlb")


def training_scheduler(scheduler: Any) -> DDPMScheduler:
    """A DDPMScheduler with the betas and the prediction type of the given scheduler, which is returned itself
    if it is one. (A Stable Diffusion folder has a PNDM scheduler.)"""
    return scheduler if isinstance(scheduler, DDPMScheduler) else DDPMScheduler.from_config(scheduler.config)


def draw_noise(
    seed: int, step: int, shape: tuple[int, ...], timesteps: int, rank: int, world: int,
    noise_offset: float = 0.0, timestep_shift: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(eps, t) for this process's slice of micro-batch `step`: a function of (seed, step) and the place in
    the global batch alone, however many processes share it.

    `noise_offset` is the amount of noise added to eps that is constant over each channel of a picture;
    without it, models hardly learn to draw very dark or very bright pictures. t is uniform in 0 .. T - 1.
    With u = t/T and s = `timestep_shift` it is then mapped to T s u/(1 + (s - 1) u), so that s > 1 draws
    noisier timesteps more often (Esser 2024, "Scaling rectified flow transformers", eq. 23, where s is
    sqrt(m/n)).
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "noise", step))
    count = shape[0] * world
    t = torch.randint(0, timesteps, (count,), generator=generator)
    if timestep_shift != 1:
        u = (t.double() + 0.5) / timesteps  # the middle of each step, so that both ends are drawn
        t = (timesteps * timestep_shift * u / (1 + (timestep_shift - 1) * u)).long()
    eps = torch.randn((count, *shape[1:]), generator=generator)
    if noise_offset:
        level = torch.randn((count, shape[1], *(1 for _ in shape[2:])), generator=generator)  # (B, C, 1, 1)
        eps = eps + noise_offset * level
    mine = slice(rank * shape[0], (rank + 1) * shape[0])
    return eps[mine], t[mine]


def target_of(scheduler: Any, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the U-Net should predict at x_t, according to the scheduler's prediction_type."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(x0, eps, t)
    return {"epsilon": eps, "sample": x0}[kind]


def diffusion_loss(kind: str, pipe: TextToImagePipeline) -> DiffusionLoss:
    """The loss of kind simple, hybrid or vlb, for the pipeline's scheduler and U-Net.

    Raises:
        ValueError: the kind does not fit the scheduler's variance; the U-Net's out_channels do not fit the
            variance; or a likelihood bound is requested for a pipeline with a VAE, whose latents have no
            discrete levels.
    """
    unet = pipe.unet.config
    require(pipe.vae is None or kind == "simple", "loss", kind, "simple with a VAE: the others are of pixels")
    channels = pipe.num_channels_latents if isinstance(pipe, InpaintPipeline) else unet.in_channels
    return DiffusionLoss(kind, training_scheduler(pipe.scheduler), unet.out_channels, channels)


class DenoisingLoss:
    """The training loss of one micro-batch, from picture indices to a scalar (Ho 2020, Algorithm 1).

    Args:
        config: the settings, which are never changed.
        unet: the pipeline's U-Net, as `accelerator.prepare` returns it.
        data: a PictureCache or LatentCache; None if the micro-batches are themselves PictureCaches (streams).
        text: captions -> states and pooled vectors; a TextCache or LiveText.
        rank, world: this process's number, and how many processes share a global batch.
        timesteps: for vlb: draws t in place of `draw_noise`, and receives the losses of all processes.
    """

    def __init__(
        self, config: DenoisingSettings, pipe: TextToImagePipeline, unet: torch.nn.Module,
        data: PictureCache | LatentCache | None, text: TextCache | LiveText,
        rank: int = 0, world: int = 1, timesteps: LossAwareTimesteps | None = None,
    ):  # fmt: skip
        self.config, self.scheduler, self.unet = config, training_scheduler(pipe.scheduler), unet
        self.rank, self.world = rank, world
        self.data, self.text, self.vae = data, text, pipe.vae
        self.pooled = pipe.requires_pooled_text
        self.self_conditioning = pipe.unet.config.get("self_conditioning", False)
        self.snr = signal_to_noise_ratio(self.scheduler.alphas_cumprod)
        self.criterion, self.timesteps = diffusion_loss(config.loss, pipe), timesteps

    def __call__(self, batch: list[int] | PictureCache, step: int) -> tuple[Tensor, dict[str, Any]]:
        config = self.config
        streamed = isinstance(batch, PictureCache)
        data: Any = batch if streamed else self.data
        indices: Any = list(range(len(batch))) if streamed else batch
        count = len(indices)
        # Like eps and t, drawn for the global batch, of which this process takes its slice
        generator = torch.Generator().manual_seed(seed_for(config.seed, "captions", step))
        draws = torch.rand(count * self.world, 4, generator=generator)[self.rank * count :][:count]
        x0 = data.images(indices, draws[:, 3] < 0.5 if config.random_flip else None)
        if streamed and self.vae is not None:
            x0 = encode_latents(self.vae, x0)
        chosen = data.choose_captions(indices, draws[:, :2], config.canonical_caption).tolist()
        dropped = (draws[:, 2] < config.caption_dropout).tolist()
        pairs = zip(chosen, dropped, strict=True)
        captions = [NULL_PROMPT if drop else data.captions[i] for i, drop in pairs]
        eps, t = draw_noise(
            config.seed, step, tuple(x0.shape), self.scheduler.config.num_train_timesteps,
            self.rank, self.world, config.noise_offset, config.timestep_shift,
        )  # fmt: skip
        # Half of the steps see an estimate of x0, the whole global batch alike: the others save one pass
        coin = torch.rand((), generator=generator)
        estimated = self.self_conditioning and bool(coin < 0.5)
        mask = self.masks(x0, step)
        if self.timesteps is None:
            return self.loss(x0, captions, eps, t, estimated=estimated, mask=mask)
        generator = torch.Generator().manual_seed(seed_for(config.seed, "timesteps", step))
        drawn = self.timesteps.draw(count * self.world, generator)
        t, share = (part[self.rank * count :][:count] for part in drawn)
        _, details = result = self.loss(x0, captions, eps, t, share, estimated, mask)
        self.timesteps.update(*(gather(details[name].to(result[0].device)) for name in ("t", "per_sample")))
        return result

    def masks(self, x0: Tensor, step: int) -> Tensor | None:
        """Masks (B, 1, H, W) in {0, 1} for pictures (B, C, H, W), 1 where the model is to paint; None unless
        the model inpaints."""
        if not self.config.inpainting:
            return None
        count, _, height, width = x0.shape
        return random_masks(self.config.seed, step, count, height, width, self.rank, self.world)

    def loss(
        self, x0: Tensor, captions: list[str], eps: Tensor, t: Tensor, share: Tensor | None = None,
        estimated: bool = False, mask: Tensor | None = None, weighted: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """(mean loss over the batch, {"t", "per_sample"} with one value per sample). The loss is the one that
        config names, by default weight(t) (target - unet(q_sample(x0, t, eps), t, text))^2.

        Args:
            x0, eps: (B, C, H, W).
            t: (B,).
            share: (B,), the weight of each sample in the mean; "per_sample" does not include it.
            estimated: a self-conditioned U-Net sees its own first estimate of x0 instead of zeros (Chen 2022,
                algorithm 1).
            mask: (B, 1, H, W); the U-Net sees it and the masked x0 besides x_t (Nichol 2022, section 2.4).
            weighted: whether snr_gamma and detail_weight apply; otherwise the loss is unweighted.
        """
        device = next(self.unet.parameters()).device
        states, pooled = (x.to(device) for x in self.text(captions))
        x0, eps, t = x0.to(device), eps.to(device), t.to(device)
        added = {"pooled_text": pooled} if self.pooled else {}
        x_t = self.scheduler.add_noise(x0, eps, t)
        seen = x_t if mask is None else see_mask(x_t, x0, mask.to(device))
        with plain_attention(device):
            if self.self_conditioning:
                added["x0_self"] = torch.zeros_like(seen)
                if estimated:
                    with torch.no_grad():
                        output = self.unet(seen, t, states, added_cond_kwargs=added).sample.float()
                    added["x0_self"] = pad_channels(self.estimate(output, x_t, t), seen.shape[1])
            output = self.unet(seen, t, states, added_cond_kwargs=added).sample
        weight, config = None, self.config
        if weighted and config.snr_gamma is not None and self.criterion.kind != "vlb":  # vlb has own weights
            kind, snr = self.scheduler.config.prediction_type, self.snr.to(device)[t]
            weight = min_snr_weight(snr, kind, config.snr_gamma, config.snr_floor)
        per_sample = self.criterion(output, target_of(self.scheduler, x0, eps, t), x0, x_t, t, weight)
        if weight is not None and config.snr_gamma is not None and config.detail_weight:
            x0_hat = self.estimate(output.float(), x_t, t, clip=False)
            per_sample = per_sample + config.detail_weight * detail_loss(x0_hat, x0, snr, config.snr_gamma)
        details = {"t": t.cpu(), "per_sample": per_sample.detach().cpu()}
        return (per_sample if share is None else share.to(device) * per_sample).mean(), details

    def estimate(self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = True) -> Tensor:
        """x0 computed from the U-Net's output, (B, C, H, W); with `clip`, clipped if the scheduler clips."""
        config = self.scheduler.config
        abar = self.scheduler.alphas_cumprod.to(x_t.device)[t].view(-1, 1, 1, 1)
        x0 = predict_x0(output[:, : x_t.shape[1]], x_t, abar, config.prediction_type)
        limit = config.clip_sample_range
        return x0.clamp(-limit, limit) if clip and config.clip_sample else x0


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU, a context that computes attention as matrix products and a softmax: for the few positions of
    small pictures, the backward pass of torch's fused kernel takes twice as long there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


@torch.no_grad()
def validation_loss(loss: DenoisingLoss, pictures: Any, seed: int, limit: int = 256) -> list[float]:
    """The unweighted mean loss in each of BUCKETS buckets of timesteps, on fixed pictures, captions, eps and
    t, so that the steps of a run can be compared."""
    count = min(limit, len(pictures))
    generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
    order = torch.randperm(len(pictures), generator=generator)[:count]
    total = loss.scheduler.config.num_train_timesteps
    sums, counts = torch.zeros(BUCKETS), torch.zeros(BUCKETS)
    for start in range(0, count, 32):
        indices = order[start : start + 32]
        x0 = pictures.images(indices)
        captions = [pictures.captions[pictures.choices[int(i)][0]] for i in indices]
        eps = torch.randn(x0.shape, generator=generator)
        t = (torch.arange(start, start + len(indices)) * 617 + 31) % total  # spread evenly over 0..T-1
        details = loss.loss(x0, captions, eps, t, mask=loss.masks(x0, start), weighted=False)[1]
        bucket = details["t"] * BUCKETS // total
        sums.index_add_(0, bucket, details["per_sample"])
        counts.index_add_(0, bucket, torch.ones(len(bucket)))
    return (sums / counts.clamp(min=1)).tolist()
