"""The one denoising loop, and the stages before and after it.

`draw` does everything that the tasks share. A `Task` defines what differs: what x_T is, what the U-Net sees
beside x_t, what happens to the known region after a step, and what is done with the decoded pictures.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..chain.guidance import guidance_scale_embedding, guide, in_guidance_interval
from .images import decode_latents, to_numpy, to_pil, to_unit
from .request import Request, check, is_number
from .steering import GradientGuidance, best_candidates, check_guides, guides_of
from .text import Conditioning, check_prompt, encode_all, plain_texts

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {"pil": to_pil, "np": to_numpy, "pt": to_unit}


class Denoise(Protocol):
    """A denoiser, guided or not: x_t of unit variance at timestep t -> the input of `scheduler.step`."""

    def __call__(self, x_t: Tensor, t: Any, sigma: float) -> Tensor: ...


class Task:
    """What differs between the tasks. This class draws pictures of `height` x `width` pixels from noise.

    A subclass overrides what its task needs. The methods are called in the order in which they appear here.
    """

    reads_text = True
    height = width = 0  # of the pictures to draw, in pixels; set by `read`

    def __init__(self, pipe: Any, request: Request) -> None:
        self.pipe, self.request = pipe, request
        self.channels: int = pipe.num_channels_latents  # C of x_t
        self.factor: int = pipe.vae_scale_factor  # pixels per latent, along one side
        self.reads_pooled: bool = pipe.requires_pooled_text
        self.tensors: dict[str, Tensor] = {}  # what callbacks may see and replace besides latents and text
        self.enlarge: Callable[[Tensor, Tensor], Tensor] | None = None  # (decoded, kept) -> larger

    def read(self) -> None:
        """Read the pictures and set `height` and `width`. Raises ValueError if they cannot be drawn."""

    def defaults(self) -> dict[str, Any]:
        """Values of arguments that a call leaves out."""
        config = self.pipe.config
        steps, scale = config.default_num_inference_steps, config.default_guidance_scale
        return {"num_inference_steps": steps, "guidance_scale": scale, "clip_guidance_scale": 0.0}

    def check(self) -> int:
        """Returns the number of prompts. Raises ValueError for what this pipeline cannot do."""
        pipe, request = self.pipe, self.request
        prompts, guided = 1, self.is_guided()
        if self.reads_text:
            tower = pipe.text_encoder
            prompts = check_prompt(request.text, guided, self.reads_pooled, pipe.tokenizer, tower)
            if tower is not None and (skip := request.clip_skip) is not None:
                layers = tower.config.num_hidden_layers
                check("clip_skip", skip, skip <= layers, f"in 0..{layers}, the text encoder's layers")
        if request.cross_attention_kwargs is not None:
            check_attention(request.cross_attention_kwargs, hasattr(pipe.unet, "attn_processors"))
        return prompts

    def is_guided(self) -> bool:
        """Whether classifier-free guidance takes further passes; not if the scale is a U-Net input."""
        scale = self.request.guidance_scale
        return scale is not None and scale > 1 and self.pipe.unet.config.get("time_cond_proj_dim") is None

    def check_tensors(self, pictures: int) -> None:
        """Raises ValueError for generators, latents or a U-Net that do not fit this number of pictures."""
        check_generators(self.request.generator, pictures)
        self.check_channels()
        if (latents := self.request.latents) is not None:
            shape, given = self.shape(pictures), getattr(latents, "shape", None)
            check("latents", given, given == shape, f"a tensor of {shape}")

    def check_channels(self) -> None:
        channels, out_channels = self.channels, self.pipe.unet.config.out_channels
        if out_channels not in (channels, 2 * channels):  # twice: a learned variance
            raise ValueError(f"A U-Net from {channels} to {out_channels} channels is no text-to-image model.")

    def shape(self, pictures: int) -> torch.Size:
        """(pictures, C, H, W) of x_t."""
        return torch.Size((pictures, self.channels, self.height // self.factor, self.width // self.factor))

    def visit(self, device: Any) -> tuple[Tensor, int]:
        """(the timesteps to visit, noisiest first; the number of steps)."""
        request, scheduler = self.request, self.pipe.scheduler
        return retrieve_timesteps(
            scheduler, request.num_inference_steps, device, request.timesteps, request.sigmas
        )

    def order(self, count: int) -> Sequence[int]:
        """The `count` steps in the order in which they are taken."""
        return range(count)

    def start(self, pictures: int, visited: Tensor, device: Any, dtype: torch.dtype) -> Tensor:
        """x_T (pictures, C, H, W), and whatever else the task draws at random, in diffusers' order."""
        return self.noise(pictures, device, dtype) * self.pipe.scheduler.init_noise_sigma

    def noise(self, pictures: int, device: Any, dtype: torch.dtype) -> Tensor:
        """z ~ N(0, I): the given `latents`, or newly drawn, from each picture's own generator in a list."""
        z = self.request.latents
        if z is None:
            z = randn_tensor(self.shape(pictures), self.request.generator, torch.device(device), dtype)
        return z.to(device=device, dtype=dtype)

    def see(self, x_t: Tensor) -> Tensor:
        """What the U-Net sees: x_t, and any further channels beside it."""
        return x_t

    def told(self, rows: int) -> dict[str, Any]:
        """Further arguments of a U-Net pass over this number of rows."""
        return {}

    def wrap(self, denoise: Denoise) -> Denoise:
        """The guided denoiser, with whatever the task does to its predictions."""
        return denoise

    def before(self, latents: Tensor, k: int, last: int | None) -> Tensor:
        """x_t for step k, after step `last` or at the start (None)."""
        return latents

    def after(self, latents: Tensor, k: int) -> Tensor:
        """x_prev after step k, with whatever the task does to it."""
        return latents

    def report(self, i: int, t: Any, latents: Tensor) -> None:
        """Called each time the progress bar moves, after step i at timestep t."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W) in about [-1, 1]."""
        return decode_latents(self.pipe.vae, latents, self.request.generator)

    def finish(self, pictures: Tensor, kept: Tensor) -> Any:
        """Pictures, decoded and checked for safety -> `output_type`. `kept` has their numbers."""
        return OUTPUTS[self.request.output_type](pictures)


# ---- checks of the pipeline


def check_attention(kwargs: Any, has_processors: bool) -> None:
    """`has_processors`: the U-Net is diffusers', whose attention processors take arguments too."""
    good = kwargs is None or (isinstance(kwargs, dict) and (has_processors or set(kwargs) <= {"scale"}))
    check("cross_attention_kwargs", kwargs, good, "a dict, its only key 'scale', the strength of LoRAs")
    if kwargs and "scale" in kwargs:
        check("cross_attention_kwargs['scale']", kwargs["scale"], is_number(kwargs["scale"]), "a number")


def check_generators(generator: Any, pictures: int) -> None:
    count = len(generator) if isinstance(generator, list) else pictures
    if count != pictures:
        raise ValueError(
            f"Got {count} generators for {pictures} pictures: each of num_images_per_prompt, and "
            "each of num_candidates, has its own."
        )


def takes_variance(scheduler: Any) -> bool:
    """Whether `scheduler.step` wants a learned variance beside the prediction.

    The config alone is not enough: `from_config` passes DDPM's variance_type on to schedulers that do not
    know it (DDIM), or that know it and then cut the output to 3 channels (DPM-Solver).
    """
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    knows = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return learned and knows and hasattr(scheduler, "_get_variance")


def noise_levels(scheduler: Any, timesteps: Tensor) -> list[float]:
    """sigma_t = sqrt((1 - abar_t)/abar_t) at each timestep that `scheduler` will visit (Karras et al. 2022).

    This is the standard deviation of the noise when the picture, in [-1, 1], has weight 1: 0 is clean,
    infinity is pure noise. Schedulers that step in sigma have the exact values (their timesteps may be
    rounded), others have `alphas_cumprod`. Call it after `set_timesteps`.

    Raises ValueError for a scheduler that has neither.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return [float(sigma) for sigma in sigmas[: len(timesteps)]]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} does not tell its noise levels")
    abar = scheduler.alphas_cumprod.double().cpu()[timesteps.cpu().long()]
    return ((1 - abar) / abar).sqrt().tolist()


def step_arguments(pipe: Any, generator: Any, eta: float) -> dict[str, Any]:
    """`generator` and `eta` for `scheduler.step`, each only if its signature takes it. If DDIM clips pixels,
    it must also take eps from the clipped x0, or strongly guided pictures fall apart."""
    accepted = inspect.signature(pipe.scheduler.step).parameters
    clips = pipe.vae is None and bool(pipe.scheduler.config.get("clip_sample"))
    offered = {"generator": generator, "eta": eta, "use_clipped_model_output": clips}
    return {name: value for name, value in offered.items() if name in accepted}


# ---- the denoiser


class Denoiser:
    """One U-Net pass and its conditioning, which callbacks may replace between steps."""

    def __init__(self, pipe: Any, task: Task, text: Conditioning) -> None:
        self.pipe, self.task, self.pooled = pipe, task, text.pooled
        self.prompt_embeds = text.states  # [negative, further prompts, prompt], (copies * B, L, D)
        self.x0_self: Tensor | None = None  # a self-conditioned U-Net's last estimate of x0
        self.takes_variance = takes_variance(pipe.scheduler)
        self.reads_pooled = task.reads_pooled

    def __call__(self, x_t: Tensor, t: Any, copies: int = 1) -> Tensor:
        """x_t (B, C, H, W) -> predictions (copies * B, C or 2C, H, W), 2C if the scheduler takes a learned
        variance. A single copy is conditioned on the prompts alone, whose states are the last rows."""
        rows, seen = copies * len(x_t), self.task.see(x_t)
        text = None if self.prompt_embeds is None else self.prompt_embeds[-rows:]
        inputs = self.inputs(rows, seen.shape[1])
        output = self.pipe.unet(
            torch.cat([seen] * copies), t, encoder_hidden_states=text, return_dict=False, **inputs
        )[0]
        return output if self.takes_variance else output[:, : self.task.channels]

    def inputs(self, rows: int, channels: int) -> dict[str, Any]:
        """The U-Net's inputs besides x_t, t and the token states: only those that its config asks for."""
        added: dict[str, Tensor] = {}
        if self.reads_pooled and self.pooled is not None:
            added["pooled_text"] = self.pooled[-rows:]  # (rows, P)
        if self.x0_self is not None:  # padded by zeros to as many channels as the U-Net sees
            missing = channels - self.x0_self.shape[1]
            padded = (
                torch.nn.functional.pad(self.x0_self, (0, 0, 0, 0, 0, missing)) if missing else self.x0_self
            )
            added["x0_self"] = torch.cat([padded] * (rows // len(padded)))
        inputs = {"cross_attention_kwargs": self.pipe._cross_attention_kwargs} | self.task.told(rows)
        if (dim := self.pipe.unet.config.get("time_cond_proj_dim")) is not None:
            embedding = guidance_scale_embedding(self.pipe._guidance_scale, dim)  # (1, dim)
            device, dtype = self.pipe._execution_device, self.pipe.unet.dtype
            inputs["timestep_cond"] = embedding.to(device, dtype).expand(rows, -1)
        return inputs | {"added_cond_kwargs": added or None}


class ClassifierFreeGuidance:
    """A denoiser guided by its own unconditional prediction. It wraps an unguided one and is called like it.

    channels, scale, phi, weights: as for `chain.guidance.guide`. A scale of 1 or less turns guidance off; it
    may change between steps. interval: the noise levels that are guided; at others the further passes are
    skipped.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        channels: int,
        scale: float,
        phi: float = 0.0,
        weights: Sequence[float] = (),
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.denoiser, self.channels, self.scale = denoiser, channels, scale
        self.phi, self.weights, self.interval = phi, weights, interval

    def __call__(self, x_t: Tensor, t: Any, sigma: float) -> Tensor:
        """The prediction for x_t (B, C, H, W) at t, whose noise level is `sigma`: (B, C or 2C, H, W)."""
        active = self.interval is None or in_guidance_interval(sigma, self.interval)
        if self.scale <= 1 or not active:
            return self.denoiser(x_t, t)
        output = self.denoiser(x_t, t, 2 + len(self.weights))
        return guide(output, self.channels, self.scale, self.phi, self.weights)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) -> (B, channels, H, W), padded with zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


def estimate_x0(step: Any, model_output: Tensor, x_t: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """The x0 that a self-conditioned U-Net sees at the next step (Chen et al. 2022, "Analog bits").

    If `scheduler.step` returned an estimate, it is used, clipped as the scheduler clips. Otherwise it is
    computed from the model's output, with abar = 1/(1 + sigma^2). eps: (x_t - sqrt(1 - abar) eps)/sqrt(abar);
    v: sqrt(abar) x_t - sqrt(1 - abar) v; sample: itself. All are (B, C, H, W), x_t of unit variance.
    """
    for name in ("pred_original_sample", "denoised"):  # the second is LCMScheduler's
        if getattr(step, name, None) is not None:
            return getattr(step, name)
    abar = 1 / (1 + sigma**2)
    if prediction_type == "epsilon":
        return (x_t - (1 - abar) ** 0.5 * model_output) / max(abar, 2.0**-48) ** 0.5
    if prediction_type == "v_prediction":
        return abar**0.5 * x_t - (1 - abar) ** 0.5 * model_output
    return model_output


# ---- the stages


def draw(pipe: Any, request: Request, task: Task) -> StableDiffusionPipelineOutput | tuple[Any, Any]:
    """Draw a request. Returns images and nsfw_content_detected (None without a safety checker).

    Raises ValueError for arguments that make no sense, before any work.
    """
    # 1. Settle the defaults, and check all that can be checked before work starts
    request.check()
    task.read()
    request.settle(pipe._callback_tensor_inputs, task.defaults())
    prompts, guided = task.check(), task.is_guided()
    each = request.num_images_per_prompt * request.num_candidates
    pictures = prompts * each
    task.check_tensors(pictures)
    if request.steered:
        size = task.height // task.factor, task.width // task.factor
        check_guides(request, pipe.components, prompts, guided, size)
    pipe._guidance_scale, pipe._guidance_rescale = request.guidance_scale, request.guidance_rescale
    pipe._clip_guidance_scale, pipe._clip_skip = request.clip_guidance_scale, request.clip_skip
    pipe._cross_attention_kwargs, pipe._interrupt = request.cross_attention_kwargs, False
    device = pipe._execution_device

    # 2. Set the timesteps before any work: a schedule that the scheduler refuses is a bad argument too
    visited, steps = task.visit(device)
    order = task.order(len(visited))
    pipe._num_timesteps, updates = len(order), steps + len(order) - len(visited)

    # 3. Encode the prompts. Negatives come first, so that the last rows are always the prompts'
    if task.reads_text:
        options: Any = (each, guided, request.clip_skip, device, request.lora_scale)
        text = encode_all(pipe, request.text, request.combined_prompts or (), *options)
    else:
        text = Conditioning(None, None, None, None, plain_texts(request.prompt))

    # 4. Draw the noise to start from, and denoise
    dtype = pipe.unet.dtype if text.states is None else text.states.dtype
    latents = task.start(pictures, visited, device, dtype)
    steer = None
    if request.climbs:
        to_x0 = functools.partial(estimate_x0, None, prediction_type=prediction_type(pipe.scheduler))
        steer = guides_of(pipe, request, text.words, text.own_pooled, pictures, to_x0, task.channels)
    latents = denoise(pipe, request, task, text, latents, visited, order, updates, steer)

    # 5. Choose the best of the candidates, and decode them
    kept = torch.arange(pictures)
    if request.num_candidates > 1:
        kept = best_candidates(pipe, request, latents, text.words, text.own_pooled)
        latents = latents[kept]
    images, flagged = latents, None
    if request.output_type != "latent":
        decoded = task.decode(latents)
        if task.enlarge is not None:
            decoded = task.enlarge(decoded, kept)
        decoded, flagged = check_safety(pipe, decoded, dtype)
        images = task.finish(decoded, kept)
    pipe.maybe_free_model_hooks()
    if not request.return_dict:
        return images, flagged
    return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)


def denoise(
    pipe: Any,
    request: Request,
    task: Task,
    text: Conditioning,
    latents: Tensor,
    visited: Tensor,
    order: Sequence[int],
    updates: int,
    steer: GradientGuidance | None,
) -> Tensor:
    """Denoise x_T = `latents` to x_0, (pictures, C, H, W).

    visited: the timesteps; order: the order in which the steps are taken; updates: how often the progress bar
    moves; steer: guidance by other networks.
    """
    scheduler, interval, callback = pipe.scheduler, request.guidance_interval, request.callback_on_step_end
    self_conditioning = pipe.unet.config.get("self_conditioning", False)
    levels, kind = [math.nan] * len(visited), prediction_type(scheduler)
    if interval is not None or self_conditioning or steer is not None:
        levels = noise_levels(scheduler, scheduler.timesteps)[-len(visited) :]
    denoiser, negative = Denoiser(pipe, task, text), text.negative
    if self_conditioning:
        denoiser.x0_self = torch.zeros_like(latents)
    scale = (request.guidance_scale or 0.0) if task.is_guided() else 1.0
    weights = list((request.combined_prompts or {}).values())
    free = ClassifierFreeGuidance(denoiser, task.channels, scale, request.guidance_rescale, weights, interval)
    guided = task.wrap(free)
    arguments = step_arguments(pipe, request.generator, request.eta)
    warm_up = len(order) - updates * scheduler.order
    last: int | None = None
    with pipe.progress_bar(total=updates) as progress_bar:
        for i, k in enumerate(order):
            if pipe._interrupt:
                continue
            t, sigma = visited[k], levels[k]
            latents = task.before(latents, k, last)
            x_t = scheduler.scale_model_input(latents, t)
            shift = None
            if steer is not None and in_guidance_interval(sigma, interval):
                output, shift = steer(functools.partial(guided, t=t, sigma=sigma), x_t, t, sigma)
            else:
                output = guided(x_t, t, sigma)
            step = scheduler.step(output, t, latents, **arguments)
            if self_conditioning:
                denoiser.x0_self = estimate_x0(step, output[:, : task.channels], latents, sigma, kind)
            latents = step.prev_sample if shift is None else shift(step.prev_sample)
            latents, last = task.after(latents, k), k

            if callback is not None:
                tensors: dict[str, Any] = {"latents": latents, "prompt_embeds": denoiser.prompt_embeds}
                tensors |= {"negative_prompt_embeds": negative, **task.tensors}
                asked = {name: tensors[name] for name in request.callback_on_step_end_tensor_inputs or ()}
                tensors |= callback(pipe, i, t, asked) or {}
                latents, denoiser.prompt_embeds = tensors["latents"], tensors["prompt_embeds"]
                negative = tensors["negative_prompt_embeds"]
                task.tensors = {name: tensors[name] for name in task.tensors}
                free.scale = pipe._guidance_scale if scale > 1 else 1.0
                free.phi = pipe._guidance_rescale
            if i == len(order) - 1 or (i + 1 > warm_up and (i + 1) % scheduler.order == 0):
                progress_bar.update()
                task.report(i, t, latents)
    return latents


def prediction_type(scheduler: Any) -> str:
    return scheduler.config.get("prediction_type", "epsilon")


def check_safety(pipe: Any, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[bool] | None]:
    """(B, 3, H, W) in [-1, 1] -> the same with flagged pictures blackened, and which ones are flagged."""
    if pipe.safety_checker is None:
        return image, None
    features = pipe.feature_extractor(to_pil(image), return_tensors="pt").to(pipe._execution_device)
    unit, flagged = pipe.safety_checker(images=to_unit(image), clip_input=features.pixel_values.to(dtype))
    return unit * 2 - 1, flagged
