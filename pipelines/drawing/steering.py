"""Guidance of one call: classifier and CLIP guidance as objects, and what a pipeline has of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain.guidance import (
    classifier_guidance,
    clip_guidance,
    clip_prediction,
    cut_outs,
    guidance_scale_embedding,
    guide,
    log_prob,
    shift_mean,
    shift_prediction,
    takes_variance,
)


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
