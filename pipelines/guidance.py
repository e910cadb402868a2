"""Guidance: pure functions that turn a model's predictions into the one the scheduler steps with.

Two kinds. Classifier-free guidance combines the U-Net's own predictions. Classifier and CLIP guidance climb
the score of another network: both give s grad_{x_t} score, and that goes into the chain in one of two ways,

    ancestral steps:          x_prev + Sigma s grad, x_prev ~ N(mean, Sigma)     Dhariwal 2021, algorithm 1
    deterministic schedulers: eps - sqrt(1 - abar_t) s grad                      Dhariwal 2021, algorithm 2
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# ---- classifier-free guidance


def classifier_free_guidance(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + s (cond - uncond): s = 1 gives `cond`, s = 0 gives `uncond`.

    Both are predictions of one kind (eps, v or x0), of one shape (B, C, H, W). This is GLIDE's and diffusers'
    s; Ho and Salimans (2022) write w = s - 1.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """phi * guided * std(cond) / std(guided) + (1 - phi) * guided, each std over one sample's (C, H, W).

    phi = 0 changes nothing; 0.7 is what Lin et al. (2023, section 3.4) use against overexposure.
    """
    dims = list(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)  # (B, 1, 1, 1)
    return phi * guided * ratio + (1 - phi) * guided


def compose(uncond: Tensor, cond: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """cond + sum_i w_i (cond_i - uncond): several prompts as one prediction. Liu 2022, equation 11.

    Guided, it is their uncond + s [(cond - uncond) + sum_i w_i (cond_i - uncond)], so w_i is a prompt's
    weight beside the first one's, which is 1; below 0 it is a prompt to stay away from (equation 13). All of
    one shape (B, C, H, W) and one kind (eps, v or x0).
    """
    return cond + sum(w * (other - uncond) for w, other in zip(weights, others, strict=True))


def guide(
    model_output: Tensor, channels: int, scale: float, phi: float = 0.0, weights: Sequence[float] = ()
) -> Tensor:
    """One U-Net pass over [negative, prompt], (2B, C or 2C, H, W) -> (B, C or 2C, H, W), guided.

    `channels` = C are guided, and rescaled by `phi`. The other C, where there are any, are a learned
    variance: that is the prompt's own, since s (cond - uncond) would push it out of its range (as in GLIDE).
    With `weights` the pass is over [negative, further prompts, prompt]; see `compose`.
    """
    uncond, *others, cond = model_output.chunk(2 + len(weights))
    together = cond[:, :channels]
    if weights:
        together = compose(uncond[:, :channels], together, [one[:, :channels] for one in others], weights)
    guided = classifier_free_guidance(uncond[:, :channels], together, scale)
    if phi > 0:
        guided = rescale_guidance(guided, cond[:, :channels], phi)
    return torch.cat([guided, cond[:, channels:]], dim=1)


def takes_variance(scheduler: Any) -> bool:
    """Whether `scheduler.step` wants a learned variance beside the prediction.

    The config alone does not tell: `from_config` hands DDPM's variance_type on to schedulers that do not know
    it (DDIM), or that know it and then cut the output to 3 channels (DPM-Solver).
    """
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    knows = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return learned and knows and hasattr(scheduler, "_get_variance")


def noise_levels(scheduler: Any, timesteps: Tensor) -> list[float]:
    """sigma_t = sqrt((1 - abar_t) / abar_t) of each timestep `scheduler` will visit (Karras et al. 2022).

    It is the noise's standard deviation where the picture, in [-1, 1], has weight 1: 0 is clean, infinity is
    pure noise. Schedulers that step in sigma hold the exact values (their timesteps may be rounded), the
    others `alphas_cumprod`. Call it after `set_timesteps`.

    Raises ValueError for a scheduler that holds neither.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return [float(sigma) for sigma in sigmas[: len(timesteps)]]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} does not tell its noise levels")
    abar = scheduler.alphas_cumprod.double().cpu()[timesteps.cpu().long()]
    return ((1 - abar) / abar).sqrt().tolist()


def in_guidance_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether lo < sigma <= hi, the noise levels that are guided (Kynkaanniemi et al. 2024, equation 6).

    No interval means all of them. Outside, the prediction is `cond` alone and no second pass is run.
    """
    return interval is None or interval[0] < sigma <= interval[1]


def guidance_scale_embedding(scale: float, dim: int) -> Tensor:
    """(1, dim) sinusoidal embedding of 1000 (s - 1), for models distilled to take the scale as an input.

    [sin(1000 w f_k), cos(1000 w f_k)], f_k = 10000^(-k / (dim/2 - 1)), w = s - 1; an odd `dim` ends with a
    zero. Their U-Net config has `time_cond_proj_dim` (Meng et al. 2023; latent consistency models).
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * torch.tensor([[scale - 1.0]]) * frequencies  # (1, half)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


# ---- classifier and CLIP guidance


def gradient_of(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grad_x of each row's own score, (B, ...) float32 or better, whatever precision `score` computes in. It
    maps (B, ...) to (B,), row by row. Gradients are on for it, also under torch.no_grad."""
    with torch.enable_grad():
        leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        return torch.autograd.grad(score(leaf).sum(), leaf)[0]


def log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of the class of each row, (B,), of logits (B, classes)."""
    return F.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None])[:, 0]


def classifier_guidance(
    classify: Callable[[Tensor], Tensor], x_t: Tensor, labels: Tensor, scale: float, limit: float = math.inf
) -> Tensor:
    """s grad_{x_t} log p(y | x_t, t), the shape of x_t. Dhariwal and Nichol 2021, section 4.

    `classify` maps x_t to logits (B, classes) at its noise level; labels (B,) are their indices. A picture's
    gradient of a root mean square above `limit` is scaled down to it: of what the classifier does not know
    it may be of any size.
    """
    gradient = scale * gradient_of(lambda x: log_prob(classify(x), labels), x_t)
    size = gradient.square().mean(tuple(range(1, x_t.ndim)), keepdim=True).sqrt()  # (B, 1, ...)
    return gradient * (limit / size.clamp(min=1e-12)).clamp(max=1.0)


def clip_guidance(
    embed: Callable[[Tensor], Tensor], x_t: Tensor, text_embeds: Tensor, logit_scale: float, scale: float
) -> Tensor:
    """s grad_{x_t} (l f(x_t) . g(c)), the shape of x_t; l is CLIP's logit scale. GLIDE, section 2.3.

    `embed` maps x_t to l2-normalised f, (B, D): an image tower trained on noised pictures, or a clean one
    behind the predicted x0; (N, B, D) are N views of each picture, whose mean counts. text_embeds: g, (B, D).
    """

    def score(x: Tensor) -> Tensor:
        similarity = logit_scale * (embed(x).float() * text_embeds.float()).sum(-1)  # (B,) or (N, B)
        return similarity.reshape(-1, len(x)).mean(0)

    return scale * gradient_of(score, x_t)


def shift_mean(sample: Tensor, gradient: Tensor, variance: Tensor | float) -> Tensor:
    """x + Sigma s grad: the mean of an ancestral step, or a draw of it, moved. Dhariwal 2021, algorithm 1.
    gradient is s grad, (B, C, ...) like `sample`; variance, Sigma, broadcasts to it."""
    return sample + variance * gradient


def shift_prediction(prediction: Tensor, gradient: Tensor, abar_t: float, prediction_type: str) -> Tensor:
    """What the model would have predicted, had its score been grad log p(x_t) + s grad. (B, C, ...) all.

    epsilon: eps - sqrt(1 - abar_t) s grad                     Dhariwal 2021, algorithm 2
    sample: x0 + (1 - abar_t)/sqrt(abar_t) s grad              the same eps, by x_t = sqrt(abar) x0 + ...
    v_prediction: v - sqrt((1 - abar_t)/abar_t) s grad         v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0

    Unlike `shift_mean` it holds for deterministic schedulers; the two agree in the limit of many steps.
    Raises ValueError for another prediction type.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")
    noise = (1 - abar_t) ** 0.5
    root = max(abar_t, 2.0**-48) ** 0.5  # as predict_x0 has it at zero terminal SNR
    factor = {"epsilon": -noise, "sample": noise**2 / root, "v_prediction": -noise / root}[prediction_type]
    return prediction + factor * gradient


def clip_prediction(prediction: Tensor, x0: Tensor, limit: float, abar_t: float, kind: str) -> Tensor:
    """The prediction, which says `x0`, of x0 clipped to [-limit, limit] at the same x_t. (B, C, ...) all.
    `kind` is its prediction_type. x0 moves by d where s grad is d sqrt(abar_t) / (1 - abar_t)."""
    gradient = (abar_t**0.5 / (1 - abar_t)) * (x0.clamp(-limit, limit) - x0)
    return shift_prediction(prediction, gradient, abar_t, kind).to(prediction.dtype)


def cut_outs(images: Tensor, count: int, size: int, seed: int) -> Tensor:
    """(B, C, H, W) -> (count, B, C, size, size): the whole picture, and squares of random place and side.

    Sides are even in half the shorter side .. all of it. A function of the seed alone, the same for all
    pictures of a batch, so that no picture depends on another. Differentiable.
    """
    height, width = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    views = [images]
    for side, top, left in torch.rand(count - 1, 3, generator=generator).tolist():
        edge = round(min(height, width) * (0.5 + 0.5 * side))
        y, x = round(top * (height - edge)), round(left * (width - edge))
        views.append(images[..., y : y + edge, x : x + edge])
    return torch.stack([F.interpolate(view, (size, size), mode="bilinear", antialias=True) for view in views])


def step_variance(scheduler: Any, model_output: Tensor, t: Any, x_t: Tensor) -> Tensor | float | None:
    """Sigma of the step from x_t: 0 for the last, which adds no noise; None for a scheduler that has no
    `p_mean_variance` (all but our DDPMScheduler), and so no mean to shift.

    The same Sigma where eta < 1 adds less noise than it tells: in the prediction, the other place for a
    gradient, x0's clipping would take away most of it on white ground.
    """
    if not hasattr(scheduler, "p_mean_variance"):
        return None
    if int(t) == int(scheduler.timesteps[-1]):
        return 0.0
    return scheduler.p_mean_variance(model_output, int(t), x_t).variance


class GradientGuidance:
    """Classifier and CLIP guidance of one call, alone, together, or neither.

    Args:
        scheduler: its class decides how the gradient goes into the chain.
        channels: C of x_t; what a prediction has more is a learned variance.
        to_x0: (prediction, x_t, sigma) -> predicted x0.
        noised: terms of x_t, each (x_t, t, sigma) -> s grad, of `classifier_guidance` or `clip_guidance`.
        clean: None, or a clean CLIP's term: its embedding of a predicted x0, (x0, seed) -> (N, B, D), and the
            remaining arguments of `clip_guidance`, (embed, text_embeds, logit_scale, scale).
        through_unet: whether the clean CLIP's gradient runs through the U-Net. If not, the Jacobian of x0 by
            x_t is taken to be sqrt(abar_t), which it is for independent pixels of unit variance: one backward
            pass of the U-Net less.
    """

    def __init__(
        self,
        scheduler: Any,
        channels: int,
        to_x0: Callable[[Tensor, Tensor, float], Tensor],
        noised: Sequence[Callable[[Tensor, Any, float], Tensor]] = (),
        clean: tuple[Callable[[Tensor, int], Tensor], Tensor, float, float] | None = None,
        through_unet: bool = False,
    ) -> None:
        self.scheduler, self.channels, self.noised, self.clean = scheduler, channels, noised, clean
        self.to_x0, self.through_unet = to_x0, through_unet

    def __bool__(self) -> bool:
        return bool(self.noised) or self.clean is not None

    def __call__(
        self, predict: Callable[[Tensor], Tensor], x_t: Tensor, t: Any, sigma: float, active: bool = True
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(the prediction to step with, a function to call on the sample that `scheduler.step` returns).

        predict: x_t -> the U-Net's prediction, classifier-free guidance and all, (B, C or 2C, H, W).
        x_t: of unit variance, as the U-Net sees it; sigma: its noise level. Not `active`, or without a term,
        the prediction and the sample stay as they are.
        """
        if not (self and active):
            return predict(x_t), lambda sample: sample
        abar = 1 / (1 + sigma**2)
        output, gradient = self._through_x0(predict, x_t, t, sigma)
        gradient = sum((term(x_t, t, sigma) for term in self.noised), gradient)
        if (variance := step_variance(self.scheduler, output, t, x_t)) is not None:
            return output, lambda sample: shift_mean(sample, gradient, variance).to(sample.dtype)
        prediction, learned = output[:, : self.channels], output[:, self.channels :]
        config = self.scheduler.config
        prediction = shift_prediction(prediction, gradient, abar, config.prediction_type).to(output.dtype)
        if config.get("clip_sample"):  # also of a class that only keeps the key
            limit, x0 = config.get("clip_sample_range", 1.0), self.to_x0(prediction, x_t, sigma)
            prediction = clip_prediction(prediction, x0, limit, abar, config.prediction_type)
        return torch.cat([prediction, learned], dim=1), lambda sample: sample

    def _through_x0(
        self, predict: Callable[[Tensor], Tensor], x_t: Tensor, t: Any, sigma: float
    ) -> tuple[Tensor, Any]:
        """(the prediction, the clean CLIP's s grad or 0.0)."""
        output: Any = None if self.clean is not None and self.through_unet else predict(x_t)
        if self.clean is None:
            return output, 0.0
        embed, text_embeds, logit_scale, scale = self.clean
        held = None if output is None else self.to_x0(output[:, : self.channels].float(), x_t.float(), sigma)

        def embed_x0(x: Tensor) -> Tensor:
            nonlocal output
            if held is not None:
                return embed(held + (x - x_t) / (1 + sigma**2) ** 0.5, int(t))
            output = predict(x.to(x_t.dtype))
            return embed(self.to_x0(output[:, : self.channels].float(), x, sigma), int(t))

        gradient = clip_guidance(embed_x0, x_t, text_embeds, logit_scale, scale)
        return output.detach(), gradient


# ---- what a pipeline has of it


class GuidanceInputs(NamedTuple):
    """A call's arguments that need more than the U-Net; `TextToImagePipeline.__call__` says what each is."""

    clip_guidance_scale: float = 0.0
    clip_guidance: str = "noised"
    clip_guidance_cut_outs: int = 8
    clip_guidance_through_unet: bool = False
    classifier_guidance_scale: float = 0.0
    class_labels: int | str | list[int] | list[str] | None = None
    combined_prompts: dict[str, float] | None = None
    num_candidates: int = 1


class GuidanceMixin:
    """The guided passes of a denoising loop, and the optional models that guide.

    A loop that steers sets `_guidance_scale`, `_guidance_rescale` and `_weights` (of combined prompts), calls
    `prepare_guidance` once and then, at each step, that object on `predict`.
    """

    config: Any
    vae_scale_factor: Any
    unet: Any
    scheduler: Any
    noisy_clip: Any
    noisy_classifier: Any
    clip_guidance_model: Any
    _execution_device: Any
    _decode: Any  # latents -> pictures in [-1, 1], differentiable
    _cross_attention_kwargs: dict[str, Any] | None
    _guidance_scale: float
    _clip_guidance_scale: float
    _guidance_rescale: float
    _weights: Sequence[float] = ()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def clip_guidance_scale(self) -> float:
        return self._clip_guidance_scale

    def guidance_defaults(
        self, guidance_scale: float | None, clip_guidance_scale: float | None, size: tuple[int, int] | Any
    ) -> tuple[float, float]:
        """(s of classifier-free, s of CLIP guidance) of a call, the folder's own where None is given:
        the latter where both are None and its `noisy_clip` sees pictures of this (height, width), else 0."""
        own, clip = self.config.default_clip_guidance_scale, self.noisy_clip
        if clip_guidance_scale is None:
            side = 0 if clip is None else clip.config.sample_size * self.vae_scale_factor
            clip_guidance_scale = own if guidance_scale is None and size == (side, side) else 0.0
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        return guidance_scale, clip_guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """guidance_scale > 1, unless the U-Net takes the scale as an input (time_cond_proj_dim)."""
        return self._guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None

    @property
    def requires_pooled_text(self) -> bool:
        """Whether the U-Net reads pooled text, so that ready `prompt_embeds` must come with theirs."""
        keys = ("pooled_text_time_embedding", "text_concat_channels")
        return self.unet is not None and any(self.unet.config.get(key) for key in keys)

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    def predict(
        self,
        x_t: Tensor,
        t: Any,
        guided: bool,
        prompt_embeds: Tensor,
        pooled: Tensor | None = None,
        x0_self: Tensor | None = None,
    ) -> Tensor:
        """What `scheduler.step` is given: one U-Net pass, over two or more copies of x_t where `guided`.

        x_t: (B, C, H, W) as `scale_model_input` made it. prompt_embeds: [negative, further prompts, prompt]
        in one tensor (copies * B, L, D), pooled likewise; unguided, the last B rows are used. Returns
        (B, C, H, W), or (B, 2C, H, W) for a scheduler that takes a learned variance.
        """
        channels = self.unet.config.in_channels
        copies = 2 + len(self._weights) if guided else 1
        rows = copies * len(x_t)
        output = self.unet(
            torch.cat([x_t] * copies),
            t,
            encoder_hidden_states=prompt_embeds[-rows:],
            return_dict=False,
            **self._unet_kwargs(rows, pooled, x0_self),
        )[0]
        if guided:
            output = guide(output, channels, self.guidance_scale, self.guidance_rescale, self._weights)
        return output if takes_variance(self.scheduler) else output[:, :channels]

    def _unet_kwargs(self, rows: int, pooled: Tensor | None, x0_self: Tensor | None) -> dict[str, Any]:
        """What the U-Net is told besides x_t, t and the token states: only what its config asks for."""
        added: dict[str, Tensor] = {}
        if self.requires_pooled_text and pooled is not None:
            added["pooled_text"] = pooled[-rows:]  # (rows, P)
        if x0_self is not None:
            added["x0_self"] = torch.cat([x0_self] * (rows // len(x0_self)))
        kwargs: dict[str, Any] = {"cross_attention_kwargs": self.cross_attention_kwargs}
        if (dim := self.unet.config.get("time_cond_proj_dim")) is not None:
            embedding = guidance_scale_embedding(self.guidance_scale, dim)  # (1, dim)
            kwargs["timestep_cond"] = embedding.to(self._execution_device, self.unet.dtype).expand(rows, -1)
        return kwargs | {"added_cond_kwargs": added or None}

    def prepare_guidance(
        self,
        given: GuidanceInputs,
        words: list[str],
        pooled: Tensor | None,
        pictures: int,
        to_x0: Callable[[Tensor, Tensor, float], Tensor],
    ) -> GradientGuidance:
        """The gradients of a call that passed `checks.check_guidance_models`.

        words: the prompts as plain text; pooled: the text tower's, a row for each picture.
        """
        noised: list[Callable[[Tensor, Any, float], Tensor]] = []
        clean = None
        if given.classifier_guidance_scale > 0:
            labels = self._labels(given.class_labels, pictures)
            scale, most = given.classifier_guidance_scale, self.noisy_classifier.config.get("guidance_limit")

            def by_classifier(x_t: Tensor, t: Any, sigma: float) -> Tensor:
                limit = math.inf if most is None else most / max(1 - 1 / (1 + sigma**2), 1e-9) ** 0.5
                return classifier_guidance(lambda x: self.noisy_classifier(x, t), x_t, labels, scale, limit)

            noised.append(by_classifier)
        if given.clip_guidance_scale > 0 and given.clip_guidance == "noised":
            assert pooled is not None
            text, logit_scale = F.normalize(pooled.float(), dim=-1), float(self.noisy_clip.scale)

            def by_clip(x_t: Tensor, t: Any, sigma: float) -> Tensor:
                scale = given.clip_guidance_scale
                return clip_guidance(lambda x: self.noisy_clip(x, t), x_t, text, logit_scale, scale)

            noised.append(by_clip)
        elif given.clip_guidance_scale > 0:
            clip, count = self.clip_guidance_model, given.clip_guidance_cut_outs

            def embed(x0: Tensor, seed: int) -> Tensor:
                images = self._decode(x0)
                images = images + (images.clamp(-1, 1) - images).detach()  # the gradient passes the clamp
                views = cut_outs(images, count, clip.image_size, seed)  # (count, B, 3, size, size)
                return clip.embed_images(views.flatten(0, 1)).unflatten(0, (count, len(images)))

            text = clip.embed_texts(words).repeat_interleave(pictures // len(words), dim=0)
            clean = (embed, text, float(clip.scale), given.clip_guidance_scale)
        through = given.clip_guidance_through_unet
        return GradientGuidance(self.scheduler, self.unet.config.in_channels, to_x0, noised, clean, through)

    def rank_candidates(
        self, given: GuidanceInputs, latents: Tensor, words: list[str], pooled: Tensor | None, keep: int
    ) -> Tensor:
        """Rows of the `keep` best candidates of each prompt, best first, of latents (prompts * n, C, H, W).

        By f(x_0) . g(c), as DALL-E reranks (Ramesh 2021, section 2.6), of `clip_guidance_model` where there
        is one, else `noisy_clip` at t = 0. Where a class guides, by what all guidance climbs, at its scales:
        s_class log p(y | x_0) + s_clip l f . g. pooled: a row for each.
        """
        s_class, clip = given.classifier_guidance_scale, self.clip_guidance_model
        count = keep * given.num_candidates
        s_clip = given.clip_guidance_scale if s_class > 0 else 1.0
        scores = latents.new_zeros(len(latents), dtype=torch.float32)
        if s_clip > 0 and clip is not None and words and (s_class == 0 or given.clip_guidance == "clean"):
            views = cut_outs(self._decode(latents).clamp(-1, 1), 1, clip.image_size, 0)[0]
            text = clip.embed_texts(words).repeat_interleave(count, dim=0)
            scores += s_clip * float(clip.scale) * (clip.embed_images(views) * text).sum(-1)
        elif s_clip > 0 and pooled is not None:
            images, text = self.noisy_clip(latents, 0), F.normalize(pooled.float(), dim=-1)
            scores += s_clip * float(self.noisy_clip.scale) * (images * text).sum(-1)
        if s_class > 0:
            labels = self._labels(given.class_labels, len(latents))
            scores += s_class * log_prob(self.noisy_classifier(latents, 0), labels)
        best = scores.unflatten(0, (-1, count)).topk(keep).indices
        return (best + count * torch.arange(len(best), device=best.device)[:, None]).flatten()

    def _labels(self, given: Any, pictures: int) -> Tensor:
        """Class numbers or names, one or one for each prompt -> (pictures,)."""
        names, listed = [*self.noisy_classifier.config.labels], given if isinstance(given, list) else [given]
        numbers = [names.index(one) if isinstance(one, str) else int(one) for one in listed]
        labels = torch.tensor(numbers, device=self._execution_device)
        return labels.repeat_interleave(pictures // len(labels))
