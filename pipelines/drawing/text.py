"""From words to the U-Net's conditioning. Training and sampling both call `encode_text`, so that both encode
every prompt, the null prompt included, in the same way."""

import logging
import re
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ..components.lora import lora_scaled
from .request import TextInputs

logger = logging.getLogger(__name__)

# (words:1.3): at least one letter before the colon, so that "(12:30)" is a time; brackets alone mean nothing
WEIGHTED = re.compile(r"\((?P<words>[^():]*[^\W\d_][^():]*):(?P<weight>[-+]?\d+(\.\d+)?)\)")
NULL_PROMPT = ""  # goes through tokenizer and encoder like any other prompt; it is not zeros


def context_length(tokenizer: Any, text_encoder: Any) -> int:
    """How many tokens a prompt may have, start and end included: the tokenizer's limit or the tower's."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def encode_text(
    tokenizer: Any, text_encoder: Any, prompts: list[str], clip_skip: int | None = None,
    max_length: int | None = None, device: torch.device | str | None = None,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Prompts -> (states (B, L, D), pooled (B, P), mask (B, L)) of a transformers CLIP text tower.

    states: the tower's last states after its final layer norm, all padded to L = `max_length` or the context.
        With `clip_skip` = n, the states n layers before the last, through the same norm.
    pooled: the last layer's state at the first end of text, through the projection if the tower has one
        (`text_embeds`, else `pooler_output`). It is found by the mask, not by `config.eos_token_id`, because
        transformers silently pools the start of text when that id is not the tokenizer's.
    mask: True from the start to the first end of text. CLIP pads with further end-of-text tokens, which
        Stable Diffusion's U-Net attends to like the rest. So does ours: the pipelines do not use the mask.

    A prompt longer than the context is cut, with a warning that shows what was cut. Gradients flow. No token
    attends to those for which `hidden`, (B, L) bool, is True.
    Raises ValueError if `clip_skip` is not in 0..number of layers.
    """
    layers = text_encoder.config.num_hidden_layers
    if clip_skip is not None and not 0 <= clip_skip <= layers:
        raise ValueError(f"clip_skip must be in 0..{layers} for a tower of {layers} layers, got {clip_skip}")
    max_length = context_length(tokenizer, text_encoder) if max_length is None else max_length
    device = text_encoder.device if device is None else device
    if hidden is None:
        _warn_of_cuts(tokenizer, prompts, max_length)
    options = {"padding": "max_length", "max_length": max_length, "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(prompts, **options)
    mask = tokens.attention_mask.to(device).bool()  # (B, L)

    masks = getattr(text_encoder.config, "use_attention_mask", False)
    tower_mask = mask.long() if masks else None
    if hidden is not None:
        tower_mask = ((mask if masks else torch.ones_like(mask)) & ~hidden.to(device)).long()
    output = text_encoder(
        tokens.input_ids.to(device), attention_mask=tower_mask, output_hidden_states=bool(clip_skip)
    )
    states = output.last_hidden_state  # (B, L, D)

    end = mask.sum(dim=1) - 1
    pooled = states[torch.arange(len(states), device=states.device), end]  # (B, D)
    if hasattr(text_encoder, "text_projection"):
        pooled = text_encoder.text_projection(pooled)  # (B, P)

    if clip_skip:
        # transformers 5: CLIPTextModel is the tower; before, and with a projection, the tower is .text_model
        tower = getattr(text_encoder, "text_model", text_encoder)
        states = tower.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    return states, pooled, mask


def split_weights(prompt: str) -> tuple[str, list[tuple[int, int, float]]]:
    """The plain text, and the start, end and weight of each weighted phrase in it.

    "a (red:1.3) heart" -> ("a red heart", [(2, 5, 1.3)]).
    """
    plain, spans, position = "", [], 0
    for match in WEIGHTED.finditer(prompt):
        plain += prompt[position : match.start()]
        start = len(plain)
        plain += match["words"]
        spans.append((start, len(plain), float(match["weight"])))
        position = match.end()
    return plain + prompt[position:], spans


def encode_weighted_text(
    tokenizer: Any, text_encoder: Any, prompts: list[str], clip_skip: int | None = None,
    max_length: int | None = None, device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`encode_text` of prompts with weights in them, "a (red:1.3) heart": (states (B, L, D), pooled (B, P)).

    z + sum_i (w_i - 1) (z - z_i), where z_i encodes the prompt with phrase i hidden from all tokens: w = 1 is
    the plain prompt, 0 leaves the phrase out, and above 1 goes further the other way. The same holds for the
    pooled text. (compel, the usual library, leaves pooled text unchanged, knows only "(red)1.3", and removes
    the brackets from names.)
    """
    parts = [split_weights(prompt) for prompt in prompts]
    texts = [plain for plain, _ in parts]
    states, pooled, _ = encode_text(tokenizer, text_encoder, texts, clip_skip, max_length, device)
    weighted = [(row, *span) for row, (_, spans) in enumerate(parts) for span in spans]
    if not weighted:
        return states, pooled
    length = states.shape[1]
    hidden = torch.zeros(len(weighted), length, dtype=torch.bool)
    for i, (row, start, end, _) in enumerate(weighted):
        offsets = tokenizer(texts[row], return_offsets_mapping=True, verbose=False).offset_mapping[1:-1]
        for place, (left, right) in enumerate(offsets[: length - 2], start=1):
            hidden[i, place] = left < end and right > start
    rows = torch.tensor([row for row, *_ in weighted], device=states.device)
    options = (clip_skip, length, device, hidden)
    without = encode_text(tokenizer, text_encoder, [texts[row] for row in rows.tolist()], *options)
    excess = torch.tensor([weight - 1 for *_, weight in weighted]).to(states)
    difference = states[rows] - without[0], pooled[rows] - without[1]
    states = states.index_add(0, rows, excess[:, None, None] * difference[0])
    return states, pooled.index_add(0, rows, excess[:, None] * difference[1])


def plain_texts(prompt: str | list[str] | None) -> list[str]:
    """A call's prompts without their weights; [] if it has ready embeddings instead."""
    lines = [prompt] if isinstance(prompt, str) else prompt or []
    return [split_weights(line)[0] for line in lines]


class TextEmbeddings(NamedTuple):
    """What `encode_for` returns, a row for each picture; the negatives are None without guidance."""

    prompt: torch.Tensor  # (pictures, L, D)
    negative: torch.Tensor | None
    pooled: torch.Tensor | None  # (pictures, P); None if ready states were given without it
    negative_pooled: torch.Tensor | None


def encode_for(
    pipe: Any, inputs: TextInputs, num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = True,
    clip_skip: int | None = None, device: torch.device | str | None = None, lora_scale: float | None = None,
) -> TextEmbeddings:  # fmt: skip
    """Encode prompts or ready embeddings that passed `check_prompt`, a row for each picture, with the tower,
    textual inversions, adapters and precision of a pipeline.

    Ready embeddings are used as they are. Prompts and negatives may contain weights, "a (red:1.3) heart"; see
    `encode_weighted_text`. A missing negative is the null prompt. `clip_skip` applies to both (diffusers'
    Stable Diffusion skips layers for the prompt only, and so subtracts states of different layers).
    """
    tokenizer, tower = pipe.tokenizer, pipe.text_encoder
    device = pipe._execution_device if device is None else device
    learned = tokenizer and set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens)
    for name in ("prompt", "negative_prompt"):
        if learned and getattr(inputs, name) is not None:  # tokens of textual inversion
            converted = pipe.maybe_convert_prompt(getattr(inputs, name), tokenizer)
            inputs = inputs._replace(**{name: converted})
    prompt, words, states, negative, pooled, negative_pooled = inputs
    with nullcontext() if lora_scale is None else lora_scaled(tower, lora_scale):
        if states is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            assert prompts is not None, "check_prompt asks for a prompt or its embeddings"
            states, encoded = encode_weighted_text(tokenizer, tower, prompts, clip_skip, device=device)
            pooled = encoded if pooled is None else pooled
        if not do_classifier_free_guidance:
            negative = negative_pooled = None
        elif negative is None:
            words = NULL_PROMPT if words is None else words
            words = [words] * len(states) if isinstance(words, str) else words
            length = states.shape[1]  # both are in one batch
            negative, encoded = encode_weighted_text(tokenizer, tower, words, clip_skip, length, device)
            negative_pooled = encoded if negative_pooled is None else negative_pooled
    dtype = (tower if pipe.unet is None else pipe.unet).dtype

    def for_each_picture(x: Any) -> Any:
        if x is None:
            return None
        return x.to(device=device, dtype=dtype).repeat_interleave(num_images_per_prompt, dim=0)

    return TextEmbeddings(*map(for_each_picture, (states, negative, pooled, negative_pooled)))


class Conditioning(NamedTuple):
    """The conditioning of one call's U-Net passes; None and [] for a U-Net that reads no text."""

    states: torch.Tensor | None  # [negative, further prompts, prompt] of all pictures, (copies * B, L, D)
    pooled: torch.Tensor | None  # likewise, (copies * B, P)
    negative: torch.Tensor | None  # the negative prompts' states alone
    own_pooled: torch.Tensor | None  # the prompts' pooled text alone, (B, P)
    words: list[str]  # the prompts without their weights, [] where ready embeddings were given


def encode_all(
    pipe: Any, inputs: TextInputs, further: Iterable[str], num_images_per_prompt: int,
    do_classifier_free_guidance: bool, clip_skip: int | None = None,
    device: torch.device | str | None = None, lora_scale: float | None = None,
) -> Conditioning:  # fmt: skip
    """What one guided U-Net pass reads: `encode_for` of a call's prompts and of `further` ones, which are
    combined with each of them. The last rows are the prompts'; without guidance there are no others."""
    options: Any = (clip_skip, device, lora_scale)
    text = encode_for(pipe, inputs, num_images_per_prompt, do_classifier_free_guidance, *options)
    others = [encode_for(pipe, TextInputs(one), 1, False, *options) for one in further]
    states, pooled = text.prompt, text.pooled
    if text.negative is not None:
        states = torch.cat([text.negative, *(one.prompt.expand_as(states) for one in others), states])
    if text.negative_pooled is not None and pooled is not None:
        rows = [one.pooled.expand_as(pooled) for one in others if one.pooled is not None]
        pooled = torch.cat([text.negative_pooled, *rows, pooled])
    return Conditioning(states, pooled, text.negative, text.pooled, plain_texts(inputs.prompt))


def check_prompt(
    inputs: TextInputs, guided: bool, requires_pooled_text: bool, tokenizer: Any, text_encoder: Any
) -> int:
    """Returns the number of prompts. Raises ValueError for anything that `encode_for` cannot handle.
    `text_encoder` is None if the pipeline has no text tower."""
    context = None if text_encoder is None else context_length(tokenizer, text_encoder)
    prompt, negative_prompt, embeds, negative_embeds, pooled, negative_pooled = inputs
    if (prompt is None) == (embeds is None):
        raise ValueError("Pass either `prompt` or `prompt_embeds`, and not both.")
    if negative_prompt is not None and negative_embeds is not None:
        raise ValueError("Pass `negative_prompt` or `negative_prompt_embeds`, not both.")
    for name in ("prompt", "negative_prompt"):
        text = getattr(inputs, name)
        is_list = isinstance(text, list) and len(text) > 0 and all(isinstance(line, str) for line in text)
        if not (text is None or isinstance(text, str) or is_list):
            raise ValueError(f"`{name}` must be a str or a list of at least one str, got {text!r}.")
    for name in inputs._fields[2:]:
        tensor, rank = getattr(inputs, name), 2 if "pooled" in name else 3
        good = isinstance(tensor, torch.Tensor) and tensor.ndim == rank and len(tensor) > 0
        if not (tensor is None or good):
            shape = getattr(tensor, "shape", type(tensor).__name__)
            raise ValueError(f"`{name}` must be a tensor of {rank} dimensions, a row a prompt, got {shape}.")

    rows: Any = prompt if embeds is None else embeds
    batch_size = 1 if isinstance(rows, str) else len(rows)
    if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
        raise ValueError(f"Got {batch_size} prompts but {len(negative_prompt)} negative prompts.")
    for name in inputs._fields[3:]:
        tensor = getattr(inputs, name)
        if tensor is not None and len(tensor) != batch_size:
            raise ValueError(f"Got {batch_size} prompts but {len(tensor)} rows of `{name}`.")
    if embeds is not None and negative_embeds is not None and embeds.shape != negative_embeds.shape:
        shapes = f"{tuple(embeds.shape)} and {tuple(negative_embeds.shape)}"
        raise ValueError(f"`prompt_embeds` and `negative_prompt_embeds` must have one shape, got {shapes}.")

    encodes_negative = guided and negative_embeds is None
    if context is None and (prompt is not None or encodes_negative):
        raise ValueError(
            "Without a text encoder pass `prompt_embeds`, and, guided, `negative_prompt_embeds`."
        )
    if embeds is not None and encodes_negative and embeds.shape[1] > (context or 0):
        raise ValueError(
            f"`prompt_embeds` has {embeds.shape[1]} tokens and the null prompt can have {context} at most: "
            "pass `negative_prompt_embeds` too."
        )
    if prompt is not None and guided and negative_embeds is not None and negative_embeds.shape[1] != context:
        length = negative_embeds.shape[1]
        raise ValueError(f"`negative_prompt_embeds` must have {context} tokens, got {length}.")
    for name, ready, missing in (
        ("prompt_embeds", embeds is not None, pooled is None),
        ("negative_prompt_embeds", guided and negative_embeds is not None, negative_pooled is None),
    ):
        if requires_pooled_text and ready and missing:
            partner = name.replace("prompt", "pooled_prompt")
            raise ValueError(f"This model reads pooled text: with `{name}` pass `{partner}` too.")
    return batch_size


def _warn_of_cuts(tokenizer: Any, prompts: list[str], max_length: int) -> None:
    for prompt in prompts:
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > max_length:
            cut = tokenizer.decode(ids[max_length - 1 : -1])  # the last place goes to the end of text
            logger.warning("The prompt is longer than %d tokens; this part was cut: %r", max_length, cut)
