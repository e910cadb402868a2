"""Guidance by other networks: a call's classifier and CLIP guidance, and the choice of its best candidates.

Each guide gives s grad_{x_t} score (`chain.guidance`), which enters the chain in one of two ways: in the mean
of an ancestral step, or in the prediction that a deterministic scheduler is given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain.guidance import (
    classifier_guidance,
    clip_guidance,
    clip_prediction,
    cut_outs,
    log_prob,
    shift_mean,
    shift_prediction,
)
from .images import decode_latents
from .request import Request, check, is_whole


def step_variance(scheduler: Any, model_output: Tensor, t: Any, x_t: Tensor) -> Tensor | float | None:
    """Sigma of the step from x_t: 0 for the last step, which adds no noise; None for a scheduler without
    `p_mean_variance` (all but our DDPMScheduler), which has no mean to shift.

    Sigma is the same where eta < 1 adds less noise than that. The alternative, shifting the prediction, would
    lose most of the gradient to the clipping of x0 on a white background.
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
        channels: C of x_t; further channels of a prediction are a learned variance.
        to_x0: (prediction, x_t, sigma) -> predicted x0.
        noised: terms of x_t, each (x_t, t, sigma) -> s grad, of `classifier_guidance` or `clip_guidance`.
        clean: None, or a clean CLIP's term: its embedding of a predicted x0, (x0, seed) -> (N, B, D), and the
            remaining arguments of `clip_guidance`, (embed, text_embeds, logit_scale, scale).
        through_unet: whether the clean CLIP's gradient runs through the U-Net. If not, the Jacobian of x0
            with respect to x_t is taken to be sqrt(abar_t), its value for independent pixels of unit
            variance, which saves a backward pass through the U-Net.
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

        predict: x_t -> the U-Net's prediction with classifier-free guidance, (B, C or 2C, H, W).
        x_t: of unit variance, as the U-Net sees it; sigma: its noise level. If not `active`, or without a
        term, the prediction and the sample do not change.
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
        if config.get("clip_sample"):  # also for a class that keeps the key unused
            limit, x0 = config.get("clip_sample_range", 1.0), self.to_x0(prediction, x_t, sigma)
            prediction = clip_prediction(prediction, x0, limit, abar, config.prediction_type)
        return torch.cat([prediction, learned], dim=1), lambda sample: sample

    def _through_x0(
        self, predict: Callable[[Tensor], Tensor], x_t: Tensor, t: Any, sigma: float
    ) -> tuple[Tensor, Any]:
        """(the prediction, the clean CLIP's s grad or, without one, 0.0)."""
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


# ---- the guides of a call


def check_guides(
    request: Request, parts: dict[str, Any], prompts: int, guided: bool, size: tuple[int, int]
) -> None:
    """Raises ValueError for guidance, combined prompts or candidates that this pipeline or call cannot use.

    parts: the pipeline's components; prompts: their number; guided: whether classifier-free guidance is on;
    size: (height, width) of x_t.
    """
    words = request.prompt is not None
    pooled = words or request.pooled_prompt_embeds is not None
    clip, noised, classifier = map(parts.get, ("clip_guidance_model", "noisy_clip", "noisy_classifier"))
    scale, by_noised = request.clip_guidance_scale or 0.0, request.clip_guidance == "noised"
    if scale > 0 and by_noised:
        check_part("clip_guidance_scale", scale, noised, "noisy_clip", "training.clip --noised")
        check("clip_guidance_scale", scale, pooled, "0 without `pooled_prompt_embeds`")
    elif scale > 0:
        check_part("clip_guidance", "clean", clip, "clip_guidance_model", "training.clip")
        check("clip_guidance", "clean", words, "'noised' without `prompt`, which the CLIP reads")

    by_class, labels = request.classifier_guidance_scale, request.class_labels
    if by_class > 0:
        check_part(
            "classifier_guidance_scale", by_class, classifier, "noisy_classifier", "training.classifier"
        )
        names = list(parts["noisy_classifier"].config.labels)
        listed = labels if isinstance(labels, list) else [labels]
        known = all((is_whole(one, 0) and one < len(names)) or one in names for one in listed)
        rule = f"one of {names}, by name or number, or a list of {prompts}, one for each prompt"
        check("class_labels", labels, known and len(listed) in (1, prompts), rule)
    else:
        check("class_labels", labels, labels is None, "left out without classifier_guidance_scale above 0")

    if request.combined_prompts is not None:
        rule = "left out without `prompt` and guidance_scale above 1"
        check("combined_prompts", request.combined_prompts, guided and words, rule)

    reranks = request.num_candidates > 1 and by_class == 0  # else ranked by what guides
    by_clip = clip is not None and words
    if reranks and not by_clip:
        models = "noisy_clip or clip_guidance_model"
        part = noised if pooled else None
        check_part("num_candidates", request.num_candidates, part, models, "training.clip")
    if noised is not None and ((scale > 0 and by_noised) or (reranks and not by_clip)):
        side, dim, tower = noised.config.sample_size, noised.config.projection_dim, parts["text_encoder"]
        check("height and width", size, size == (side, side), f"such that noisy_clip sees {side} x {side}")
        if tower is not None:
            width = (
                tower.config.projection_dim if hasattr(tower, "text_projection") else tower.config.hidden_size
            )
            rule = f"trained for this model, whose pooled text has {width} dimensions"
            check("noisy_clip", f"one of {dim} dimensions", dim == width, rule)


def check_part(name: str, value: Any, part: Any, wanted: str, recipe: str) -> None:
    """Raises ValueError if the model that an argument needs is missing, and says how to get one."""
    if part is None:
        shipped = "noisy" in wanted  # models/emoji-guidance, for models/emoji
        ways = "pipe.load_guides(folder) takes those beside a model, such as models/emoji-guidance; or train"
        raise ValueError(
            f"`{name}`={value!r} needs a model that this pipeline does not have, {wanted}: "
            f"{ways if shipped else 'train'} one with {recipe} and pass it to from_pretrained by that name."
        )


def guides_of(
    pipe: Any,
    request: Request,
    words: list[str],
    pooled: Tensor | None,
    pictures: int,
    to_x0: Callable[[Tensor, Tensor, float], Tensor],
    channels: int,
) -> GradientGuidance:
    """The gradients of a call that passed `check_guides`.

    words: the prompts as plain text; pooled: pooled text, a row for each picture; channels: C of x_t.
    """
    noised: list[Callable[[Tensor, Any, float], Tensor]] = []
    clean = None
    if request.classifier_guidance_scale > 0:
        labels = label_numbers(pipe, request.class_labels, pictures)
        by_class, most = request.classifier_guidance_scale, pipe.noisy_classifier.config.get("guidance_limit")

        def by_classifier(x_t: Tensor, t: Any, sigma: float) -> Tensor:
            limit = math.inf if most is None else most / max(1 - 1 / (1 + sigma**2), 1e-9) ** 0.5
            return classifier_guidance(lambda x: pipe.noisy_classifier(x, t), x_t, labels, by_class, limit)

        noised.append(by_classifier)
    scale = request.clip_guidance_scale or 0.0
    if scale > 0 and request.clip_guidance == "noised":
        assert pooled is not None
        text, logit_scale = F.normalize(pooled.float(), dim=-1), float(pipe.noisy_clip.scale)

        def by_clip(x_t: Tensor, t: Any, sigma: float) -> Tensor:
            return clip_guidance(lambda x: pipe.noisy_clip(x, t), x_t, text, logit_scale, scale)

        noised.append(by_clip)
    elif scale > 0:
        clip, count = pipe.clip_guidance_model, request.clip_guidance_cut_outs

        def embed(x0: Tensor, seed: int) -> Tensor:
            images = decoded(pipe, x0)
            images = images + (images.clamp(-1, 1) - images).detach()  # the gradient ignores the clamp
            views = cut_outs(images, count, clip.image_size, seed)  # (count, B, 3, size, size)
            return clip.embed_images(views.flatten(0, 1)).unflatten(0, (count, len(images)))

        text = clip.embed_texts(words).repeat_interleave(pictures // len(words), dim=0)
        clean = (embed, text, float(clip.scale), scale)
    through = request.clip_guidance_through_unet
    return GradientGuidance(pipe.scheduler, channels, to_x0, noised, clean, through)


def best_candidates(
    pipe: Any, request: Request, latents: Tensor, words: list[str], pooled: Tensor | None
) -> Tensor:
    """The rows of latents (prompts * n, C, H, W) that hold the `num_images_per_prompt` best candidates of
    each prompt, best first; pooled: a row for each.

    The score is f(x_0) . g(c), as in DALL-E's reranking (Ramesh 2021, section 2.6), by `clip_guidance_model`
    if there is one, else by `noisy_clip` at t = 0. With classifier guidance it is what all guidance climbs,
    with the same scales: s_class log p(y | x_0) + s_clip l f . g.
    """
    s_class, clip, keep = (
        request.classifier_guidance_scale,
        pipe.clip_guidance_model,
        request.num_images_per_prompt,
    )
    count = keep * request.num_candidates
    s_clip = (request.clip_guidance_scale or 0.0) if s_class > 0 else 1.0
    scores = latents.new_zeros(len(latents), dtype=torch.float32)
    if s_clip > 0 and clip is not None and words and (s_class == 0 or request.clip_guidance == "clean"):
        views = cut_outs(decoded(pipe, latents).clamp(-1, 1), 1, clip.image_size, 0)[0]
        text = clip.embed_texts(words).repeat_interleave(count, dim=0)
        scores += s_clip * float(clip.scale) * (clip.embed_images(views) * text).sum(-1)
    elif s_clip > 0 and pooled is not None:
        images, text = pipe.noisy_clip(latents, 0), F.normalize(pooled.float(), dim=-1)
        scores += s_clip * float(pipe.noisy_clip.scale) * (images * text).sum(-1)
    if s_class > 0:
        labels = label_numbers(pipe, request.class_labels, len(latents))
        scores += s_class * log_prob(pipe.noisy_classifier(latents, 0), labels)
    best = scores.unflatten(0, (-1, count)).topk(keep).indices
    return (best + count * torch.arange(len(best), device=best.device)[:, None]).flatten()


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Latents of any precision -> pictures in [-1, 1]; differentiable."""
    return decode_latents(pipe.vae, latents.to(pipe.unet.dtype))


def label_numbers(pipe: Any, given: Any, pictures: int) -> Tensor:
    """Class numbers or names, one or one for each prompt -> (pictures,)."""
    names, listed = [*pipe.noisy_classifier.config.labels], given if isinstance(given, list) else [given]
    numbers = [names.index(one) if isinstance(one, str) else int(one) for one in listed]
    labels = torch.tensor(numbers, device=pipe._execution_device)
    return labels.repeat_interleave(pictures // len(labels))
