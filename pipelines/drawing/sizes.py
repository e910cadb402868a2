"""Sizes: those that a model draws by itself, and larger ones in two stages (Nichol 2022, section 3)."""

from typing import Any

import torch

from .images import nearest_size


def check_allowed(height: int, width: int, unit: int, name: str) -> None:
    """Raises ValueError with the nearest size, unless the model can draw height x width."""
    if height < 1 or width < 1 or height % unit or width % unit:
        nearest = nearest_size(height, width, unit)
        raise ValueError(
            f"{name} must be positive multiples of {unit}, got height {height} and width {width}. The "
            f"nearest are height={nearest[0]}, width={nearest[1]}: pass these to have pictures resized."
        )


# ---- two stages: drawn small, then enlarged by `pipe.upsampler`


def enlargement(pipe: Any, height: Any, width: Any, has_prompt: bool) -> int:
    """The upsampler's factor if both sides are at least that many times the model's own, else 1.

    Raises ValueError for sides that are not multiples of factor times unit, and if the upsampler reads text
    but the call has no prompt.
    """
    factor, sides = pipe.upsampler.scale, {"height": height, "width": width}
    own = reversed(pipe.sample_size)
    if not all(isinstance(a, int) and a >= factor * b for a, b in zip(sides.values(), own, strict=True)):
        return 1
    unit = pipe.size_unit * factor
    for name, side in sides.items():
        if side % unit:
            raise ValueError(
                f"`{name}` must be a multiple of {unit}, since the upsampler enlarges {factor} times, "
                f"got {side}; the nearest is {max(1, round(side / unit)) * unit}."
            )
    if pipe.upsampler.reads_text and not has_prompt:
        raise ValueError("`prompt` is needed where the upsampler reads text, got ready embeddings alone.")
    return factor


def enlarge(
    pipe: Any,
    image: torch.Tensor,
    prompts: list[str],
    generator: torch.Generator | list[torch.Generator] | None,
    kept: torch.Tensor,
) -> torch.Tensor:
    """(B, 3, h, w) -> (B, 3, factor h, factor w), both in [-1, 1], with the upsampler's own settings.

    prompts: B or fewer, each for a run of neighbouring pictures. kept: (B,), the numbers of these pictures
    among all that were drawn; a list `generator` has one for each that was drawn.
    """
    if isinstance(generator, list):
        generator = [generator[i] for i in kept.tolist()]
    words = [prompt for prompt in prompts for _ in range(len(image) // len(prompts))] or None
    pipe.upsampler.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    drawn = pipe.upsampler(words, image=image / 2 + 0.5, generator=generator, output_type="pt").images
    return drawn * 2 - 1
