"""Large pictures in two stages: drawn small, then enlarged by another pipeline (Nichol 2022, section 3)."""

from typing import Any

import torch


class TwoStageMixin:
    """With `pipe.upsampler = SuperResolutionPipeline.from_pretrained(...)` large sizes take two stages.

    The upsampler is a pipeline of its own: it is neither saved nor moved with this one.
    """

    upsampler: Any = None

    @property
    def size_unit(self: Any) -> int:
        """Heights and widths are multiples of this many pixels."""
        return self.vae_scale_factor * self.unet.config.get("patch_size", 1)

    def enlargement(self, height: Any, width: Any, own: tuple[int, int], unit: int, has_prompt: bool) -> int:
        """By how much a picture of `height` x `width` is to be enlarged: the upsampler's factor where both
        sides are that much larger than the model's `own`, in pixels, or more; else 1. The model draws
        multiples of `unit`.

        Raises ValueError for sides that are no multiples of factor times unit, and for an upsampler that
        reads text where the call has none.
        """
        if self.upsampler is None:
            return 1
        factor = self.upsampler.scale
        sides = {"height": height, "width": width}
        if not all(isinstance(a, int) and a >= factor * b for a, b in zip(sides.values(), own, strict=True)):
            return 1
        unit *= factor
        for name, side in sides.items():
            if side % unit:
                raise ValueError(
                    f"`{name}` must be a multiple of {unit}, since the upsampler enlarges {factor} times, "
                    f"got {side}; the nearest is {max(1, round(side / unit)) * unit}."
                )
        if self.upsampler.reads_text and not has_prompt:
            raise ValueError("`prompt` is needed where the upsampler reads text, got ready embeddings alone.")
        return factor

    def enlarge(
        self,
        image: torch.Tensor,
        prompts: list[str],
        generator: torch.Generator | list[torch.Generator] | None,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """(B, 3, h, w) -> (B, 3, factor h, factor w), both in [-1, 1], with the upsampler's own settings.

        prompts: B or fewer, each of neighbouring pictures. kept: (B,) numbers of the pictures among those
        that were drawn, of which `generator` may have one each.
        """
        if isinstance(generator, list):
            generator = [generator[i] for i in kept.tolist()]
        words = [prompt for prompt in prompts for _ in range(len(image) // len(prompts))] or None
        self.upsampler.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return (
            self.upsampler(words, image=image / 2 + 0.5, generator=generator, output_type="pt").images * 2 - 1
        )
