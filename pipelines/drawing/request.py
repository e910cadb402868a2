"""The arguments of a call: the one place for their names, defaults, ranges, errors and help.

`Request` has the arguments of every task. Python, the command line, the page and the text in a PNG all take
names, defaults and ranges from here: a new argument is one line below and one line where it acts.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

CLIP_FORMS = ("noised", "clean")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NO_IP_ADAPTER = (
    "is not supported: IP-Adapter needs attention layers for images, which ConditionalUNet does not have. "
    "Use diffusers' StableDiffusionPipeline with its UNet2DConditionModel."
)

# ---- rules


class Rule(NamedTuple):
    """What an argument may be: a test, its description for errors, and the ends of a range of numbers."""

    good: Callable[[Any], bool]
    text: str
    low: float | None = None
    high: float | None = None


def check(name: str, value: Any, good: bool, rule: str) -> None:
    """Raises ValueError unless `good`, naming the argument, its value and what is allowed."""
    if not good:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def is_whole(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value)


def _is_interval(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))
    return pair and 0 <= value[0] < value[1]


def _are_weighted(value: Any) -> bool:
    pairs = value.items() if isinstance(value, dict) and value else [(None, None)]
    return all(isinstance(prompt, str) and is_number(weight) for prompt, weight in pairs)


def _are_generators(value: Any) -> bool:
    import torch  # imported late: the command line's --help and errors do not need it

    listed = value if isinstance(value, list) else [value]
    return all(isinstance(one, torch.Generator | None) for one in listed)


def optional(rule: Rule) -> Rule:
    """The same rule, but None is allowed too."""
    return rule._replace(good=lambda value: value is None or rule.good(value))


def among(values: tuple[str, ...]) -> Rule:
    return Rule(lambda value: value in values, f"one of {values}")


ANYTHING = Rule(lambda value: True, "anything")
COUNT = Rule(lambda value: is_whole(value, 1), "a whole number above 0", 1)
WHOLE = Rule(lambda value: is_whole(value, 0), "a whole number, 0 or more", 0)
SHARE = Rule(lambda value: is_number(value) and 0 <= value <= 1, "in 0..1", 0, 1)
SCALE = Rule(lambda value: is_number(value) and 0 <= value < math.inf, "0 (off) or more", 0)
GUIDANCE = SCALE._replace(text="0 or more (1 or less is off)")
SCALED = Rule(lambda value: isinstance(value, dict), "a dict, its only key 'scale', the strength of LoRAs")
UNSUPPORTED = Rule(lambda value: value is None, "left out")

# ---- the arguments

TEXT, IMAGE, INPAINT, UPSCALE = "text_to_image", "image_to_image", "inpaint", "super_resolution"
EVERY = (TEXT, IMAGE, INPAINT, UPSCALE)


def argument(
    default: Any, rule: Rule, help: str, only: tuple[str, ...] = EVERY, kind: type | None = None
) -> Any:
    """A field of `Request`. `only`: the tasks that take it; `kind`: its type on the command line, None if it
    can only be passed in Python."""
    return field(default=default, metadata={"rule": rule, "help": help, "only": only, "kind": kind})


class TextInputs(NamedTuple):
    """A call's text arguments, by diffusers' names: prompts, or ready embeddings, a row for each prompt."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None  # (B, L, D)
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None  # (B, P)
    negative_pooled_prompt_embeds: torch.Tensor | None = None


@dataclass
class Request:
    """The arguments of one call, by their names in Python; those that its task does not take stay unset.

    Names, order and meaning are those of diffusers wherever diffusers has the argument.
    """

    prompt: Any = argument(
        None, ANYTHING,
        "One prompt or a list; '(red:1.3)' weights words. Text beyond the context is cut, with a warning.",
    )  # fmt: skip
    image: Any = argument(
        None, ANYTHING, "The picture to start from, or one for each prompt; see `images.read_pictures`.",
        (IMAGE, INPAINT, UPSCALE),
    )  # fmt: skip
    mask_image: Any = argument(
        None, ANYTHING,
        "White is repainted, black or transparent is kept; one mask, or one for each prompt.", (INPAINT,),
    )  # fmt: skip
    masked_image_latents: Any = argument(
        None, ANYTHING, "Latents of the picture with the masked part grey (0), instead of encoding it.",
        (INPAINT,),
    )  # fmt: skip
    height: int | None = argument(
        None, ANYTHING, "Height in pixels; by default what the model was trained on.",
        (TEXT, IMAGE, INPAINT), int,
    )  # fmt: skip
    width: int | None = argument(
        None, ANYTHING, "Width in pixels; by default what the model was trained on.",
        (TEXT, IMAGE, INPAINT), int,
    )  # fmt: skip
    padding_mask_crop: int | None = argument(
        None, optional(WHOLE._replace(text="pixels, 0 or more")),
        "Repaint only the region around the mask, and this many pixels on each side, at `height` x `width`.",
        (INPAINT,), int,
    )  # fmt: skip
    strength: float = argument(
        0.8, SHARE, "Share of the schedule to run: 1 starts from noise, less keeps more of the picture.",
        (IMAGE, INPAINT), float,
    )  # fmt: skip
    num_inference_steps: int | None = argument(
        None, optional(COUNT), "Denoising steps; by default the model's own.", EVERY, int
    )
    timesteps: list[int] | None = argument(
        None, ANYTHING, "Descending timesteps instead of the scheduler's own, if it accepts them."
    )
    sigmas: list[float] | None = argument(
        None, ANYTHING, "Descending noise levels instead of the scheduler's own, if it accepts them."
    )
    guidance_scale: float | None = argument(
        None, optional(GUIDANCE),
        "s of uncond + s (cond - uncond), how closely to follow the prompt; 1 or less is off; by default the "
        "model's own.", EVERY, float,
    )  # fmt: skip
    noise_level: int | None = argument(
        None, optional(WHOLE),
        "Noise added to the small picture, up to the model's max_noise_level: more invents more detail.",
        (UPSCALE,), int,
    )  # fmt: skip
    negative_prompt: Any = argument(
        None, ANYTHING, "What to avoid, instead of the empty prompt; one, or one for each prompt.",
        EVERY, str,
    )  # fmt: skip
    num_images_per_prompt: int = argument(1, COUNT, "Pictures for each prompt.", EVERY, int)
    eta: float = argument(0.0, SHARE, "DDIM's share of noise; other schedulers ignore it.", EVERY, float)
    generator: torch.Generator | list[torch.Generator] | None = argument(
        None, Rule(_are_generators, "a torch.Generator or a list of them"),
        "One generator, used in diffusers' order, or a list with one for each picture (and candidate), so "
        "that a picture depends on its own seed alone and not on its batch.",
    )  # fmt: skip
    latents: torch.Tensor | None = argument(
        None, ANYTHING, "z ~ N(0, I), (pictures, C, H, W) at the U-Net's resolution, instead of drawing it.",
        (TEXT, INPAINT, UPSCALE),
    )  # fmt: skip
    prompt_embeds: torch.Tensor | None = argument(
        None, ANYTHING, "Token states (B, L, D) instead of prompts."
    )
    negative_prompt_embeds: torch.Tensor | None = argument(
        None, ANYTHING, "Token states instead of negative prompts."
    )
    ip_adapter_image: None = argument(None, UNSUPPORTED, "Not supported.", (TEXT, IMAGE, INPAINT))
    ip_adapter_image_embeds: None = argument(None, UNSUPPORTED, "Not supported.", (TEXT, IMAGE, INPAINT))
    output_type: str = argument(
        "pil", among(OUTPUT_TYPES),
        '"pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent", undecoded.',
    )  # fmt: skip
    return_dict: bool = argument(True, ANYTHING, "False returns (images, nsfw_content_detected).")
    cross_attention_kwargs: dict[str, Any] | None = argument(
        None, optional(SCALED), '{"scale": s}: the strength of loaded LoRAs in text encoder and U-Net.'
    )
    guidance_rescale: float = argument(
        0.0, SHARE, "phi of Lin et al. (2023): how far guided predictions are rescaled to unguided ones.",
        EVERY, float,
    )  # fmt: skip
    clip_skip: int | None = argument(
        None, optional(WHOLE),
        "Text encoder layers to leave out, for the prompt and the negative prompt alike.", EVERY, int,
    )  # fmt: skip
    callback: Any = argument(None, ANYTHING, "f(i, t, x_t), every `callback_steps` steps.", (UPSCALE,))
    callback_steps: int = argument(1, COUNT, "How often `callback` is called.", (UPSCALE,))
    callback_on_step_end: Any = argument(
        None, Rule(lambda value: value is None or callable(value), "callable"),
        "f(pipe, i, t, tensors) -> dict of tensors to replace. While guidance is on, `prompt_embeds` is "
        "[negative, prompt] in one tensor, as in Stable Diffusion's loop.",
    )  # fmt: skip
    callback_on_step_end_tensor_inputs: list[str] | None = argument(
        None, ANYTHING, 'Names from `_callback_tensor_inputs`; by default ["latents"].'
    )
    guidance_interval: tuple[float, float] | None = argument(
        None, optional(Rule(_is_interval, "noise levels (lo, hi), 0 <= lo < hi")),
        "(lo, hi) in sigma = sqrt((1 - abar) / abar): guidance of any kind is on where lo < sigma <= hi; "
        "elsewhere its passes are skipped (Kynkaanniemi et al. 2024).", EVERY, tuple,
    )  # fmt: skip
    pooled_prompt_embeds: torch.Tensor | None = argument(
        None, ANYTHING, "(B, P), with `prompt_embeds`, where `requires_pooled_text` is true."
    )
    negative_pooled_prompt_embeds: torch.Tensor | None = argument(
        None, ANYTHING, "(B, P), with `negative_prompt_embeds`."
    )
    clip_guidance_scale: float | None = argument(
        None, optional(SCALE),
        "s of CLIP guidance; 0 is off. By default the model's own in text to image if guidance_scale is not "
        "given either, otherwise 0.", EVERY, float,
    )  # fmt: skip
    clip_guidance: str = argument(
        "noised", among(CLIP_FORMS),
        '"noised", by `noisy_clip`, or "clean", by `clip_guidance_model` on the predicted x0.', EVERY, str,
    )  # fmt: skip
    clip_guidance_cut_outs: int = argument(
        8, COUNT, "Views that a clean CLIP sees: the whole picture, and squares from it.", EVERY, int
    )
    clip_guidance_through_unet: bool = argument(
        False, ANYTHING, "Run a clean CLIP's gradient through the U-Net, which at least doubles the time.",
        EVERY, bool,
    )  # fmt: skip
    classifier_guidance_scale: float = argument(
        0.0, SCALE, "s of guidance by `noisy_classifier` towards `class_labels`; 0 is off.",
        EVERY, float,
    )  # fmt: skip
    class_labels: Any = argument(
        None, ANYTHING, "Classes of `noisy_classifier`, by name or number; one, or one for each prompt.",
        EVERY, str,
    )  # fmt: skip
    combined_prompts: dict[str, float] | None = argument(
        None, optional(Rule(_are_weighted, "a dict of prompts and their weights")),
        "Further prompts and their weights w_i, drawn together with each prompt: uncond + s [(cond - uncond) "
        "+ sum_i w_i (cond_i - uncond)]; w_i < 0 steers away.", EVERY, dict,
    )  # fmt: skip
    num_candidates: int = argument(
        1, COUNT, "Draw this many for each picture and keep the best by CLIP and, if one guides, by class.",
        EVERY, int,
    )  # fmt: skip
    jump_length: int = argument(
        10, COUNT, "RePaint: after every `jump_length` steps, go back that many and denoise again.",
        (INPAINT,), int,
    )  # fmt: skip
    jump_n_sample: int = argument(
        1, COUNT, "RePaint: how often each step is taken; 1 is off, the paper uses 10.", (INPAINT,), int
    )
    consistency: float = argument(
        1.0, SHARE, "Without a vae: how far to move each x0 from the U-Net's own (0) to one that shrinks to "
        "the small picture (1).", (UPSCALE,), float,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """None means the default for arguments that callers of diffusers may pass as None."""
        for name in ("num_images_per_prompt", "output_type"):
            if getattr(self, name) is None:
                setattr(self, name, ARGUMENTS[name].default)

    def check(self) -> None:
        """Raises ValueError for the first argument that no model could accept."""
        for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` {NO_IP_ADAPTER}")
        for name, known in ARGUMENTS.items():
            rule: Rule = known.metadata["rule"]
            if rule is not ANYTHING:
                value = getattr(self, name)
                check(name, value, rule.good(value), rule.text)

    def settle(self, tensor_inputs: list[str], defaults: dict[str, Any]) -> None:
        """Fill in arguments left to the model from `defaults`, by name. Raises ValueError for a callback that
        asks for tensors that are not among `tensor_inputs`. Also sets:

        text: the text arguments by themselves; lora_scale: from `cross_attention_kwargs`; climbs: whether
        another network's gradient guides; steered: whether the call uses anything of `drawing.steering`.
        """
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if hasattr(self.callback_on_step_end, "tensor_inputs"):  # one of diffusers' own callbacks
            self.callback_on_step_end_tensor_inputs = self.callback_on_step_end.tensor_inputs
        asked = self.callback_on_step_end_tensor_inputs
        asked = self.callback_on_step_end_tensor_inputs = ["latents"] if asked is None else asked
        known = set(asked) <= set(tensor_inputs)
        check("callback_on_step_end_tensor_inputs", asked, known, f"among {tensor_inputs}")
        self.text = TextInputs(*(getattr(self, name) for name in TextInputs._fields))
        self.lora_scale: float | None = (self.cross_attention_kwargs or {}).get("scale")
        self.climbs = (self.clip_guidance_scale or 0) > 0 or self.classifier_guidance_scale > 0
        given = self.class_labels is not None or self.combined_prompts is not None
        self.steered = self.climbs or given or self.num_candidates > 1


ARGUMENTS = {one.name: one for one in fields(Request)}


def check_size(height: Any, width: Any, unit: int) -> None:
    """Raises ValueError with the nearest size, unless both are positive multiples of `unit` pixels."""
    for name, size in {"height": height, "width": width}.items():
        nearest = f"; the nearest is {max(1, round(size / unit)) * unit}" if is_number(size) else ""
        check(name, size, is_whole(size, 1) and size % unit == 0, f"a positive multiple of {unit}{nearest}")


# ---- methods that take them


def takes(task: str, order: str, **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes `method(self, request)` a method with diffusers' arguments.

    Args:
        task: one of `EVERY`; the method takes all arguments of that task.
        order: names of the arguments that may also be passed by position, in diffusers' order.
        defaults: the defaults that differ in this task.
    """
    names = order.split()
    rest = [name for name, one in ARGUMENTS.items() if task in one.metadata["only"] and name not in names]
    either, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            name,
            either if name in names else keyword,
            default=defaults.get(name, ARGUMENTS[name].default),
            annotation=ARGUMENTS[name].type,
        )
        for name in names + rest
    ]

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(self, Request(**(defaults | bind(*args, **kwargs).arguments)))

        own = inspect.Parameter("self", either)
        bind = inspect.Signature(parameters).bind
        call.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        lines = [f"    {one.name}: {ARGUMENTS[one.name].metadata['help']}" for one in parameters]
        call.__doc__ = "\n".join([inspect.getdoc(method) or "", "", "Args:", *lines])
        return call

    return decorate
