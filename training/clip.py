"""Train a small CLIP from scratch on captioned pictures.

    accelerate launch -m training.clip --config training/configs/clip.yaml

Two are shipped or kept: one whose text tower conditions the image model, trained on the training split
only; and a judge, of another size and seed, that sees every split and only scores.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from open_clip.loss import ClipLoss
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from training.config import parse_config, require
from training.data import (
    PictureCache,
    StepBatchSampler,
    cache_pictures,
    concept_weights,
    load_pictures,
    seed_for,
)
from training.loop import Checkpoints, fit
from training.tokenizer import build_clip_tokenizer


@dataclass
class ClipTrainingConfig:
    """Settings of `training.clip`."""

    output_dir: str = field(metadata={"help": "Where the trained CLIP and its checkpoints go."})
    dataset: str = field(
        default="data/emoji", metadata={"help": "Saved data set, picture folder or Hub name."}
    )
    splits: str = field(default="train", metadata={"help": "Splits to train on, joined by +."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, computed once."})
    resolution: int = field(default=64, metadata={"help": "Side of the pictures, in pixels."})
    patch_size: int = field(default=8, metadata={"help": "Side of the image tower's patches, in pixels."})
    vision_width: int = field(default=256, metadata={"help": "Width of the image tower."})
    vision_layers: int = field(default=6, metadata={"help": "Layers of the image tower."})
    text_width: int = field(default=256, metadata={"help": "Width of the text tower."})
    text_layers: int = field(default=6, metadata={"help": "Layers of the text tower."})
    head_dim: int = field(default=64, metadata={"help": "Width of one attention head in both towers."})
    projection_dim: int = field(default=256, metadata={"help": "Width of the shared space."})
    num_merges: int = field(
        default=8192, metadata={"help": "How many of CLIP's merges the vocabulary keeps."}
    )
    context_length: int = field(default=32, metadata={"help": "Tokens of a caption, start and end included."})
    canonical_caption: float = field(default=0.5, metadata={"help": "How often the first caption is used."})
    train_batch_size: int = field(default=256, metadata={"help": "Pairs for each process and step."})
    max_train_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    adam_weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    shift: int = field(default=5, metadata={"help": "Augmentation: shift by up to this many pixels."})
    noise: float = field(
        default=0.15, metadata={"help": "Augmentation: Gaussian noise up to this deviation."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16 or bf16; default accelerate's."}
    )
    attention: str = field(
        default="eager", metadata={"help": "eager or sdpa; in bf16 on a CPU eager is faster."}
    )
    checkpointing_steps: int = field(default=200, metadata={"help": "Save every so many steps."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' or a folder."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches and captions."})


def build_clip(config: ClipTrainingConfig) -> CLIPModel:
    """A CLIPModel (Radford 2021) of the sizes asked for; its vocabulary is `training.tokenizer`'s."""
    vocabulary = config.num_merges + 514
    shared: dict[str, Any] = {"hidden_act": "gelu", "projection_dim": config.projection_dim}
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_width // config.head_dim,
        max_position_embeddings=config.context_length,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        **shared,
    )
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_width // config.head_dim,
        image_size=config.resolution,
        patch_size=config.patch_size,
        **shared,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=config.projection_dim
        )
    )


def augment(images: Tensor, shift: int, noise: float, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to `shift` pixels on its white ground, and add noise of a random deviation, so
    that the tower looks at shapes rather than at single pixels."""
    batch, _, height, width = images.shape
    if shift:
        padded = F.pad(images, [shift] * 4, value=1.0)
        offsets = torch.randint(0, 2 * shift + 1, (batch, 2), generator=generator).tolist()
        images = torch.stack(
            [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)]
        )
    if noise:
        deviation = noise * torch.rand(batch, 1, 1, 1, generator=generator)
        images = images + deviation * torch.randn(images.shape, generator=generator)
    return images


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """(B, L) ids, cut to the context and padded to the longest caption; the causal mask makes the padding
    after the end of text invisible, so no attention mask is needed."""
    return tokenizer(captions, truncation=True, padding="longest", return_tensors="pt").input_ids


def load_splits(config: ClipTrainingConfig) -> PictureCache:
    import datasets

    parts = [load_pictures(config.dataset, split) for split in config.splits.split("+")]
    data = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return cache_pictures(data, config.resolution, config.cache_dir, "image", "caption")


def main() -> None:
    config = parse_config(ClipTrainingConfig)
    require(
        config.resolution % config.patch_size == 0, "patch_size", config.patch_size, "a divisor of resolution"
    )
    require(
        config.text_width % config.head_dim == 0, "text_width", config.text_width, "a multiple of head_dim"
    )
    require(
        config.vision_width % config.head_dim == 0,
        "vision_width",
        config.vision_width,
        "a multiple of head_dim",
    )
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    cache = load_splits(config)
    tokenizer = build_clip_tokenizer(config.num_merges, config.context_length)
    model = build_clip(config)
    model.set_attn_implementation(config.attention)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.adam_weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    checkpoints = Checkpoints(accelerator, config.output_dir, "clip", limit=1)
    start = checkpoints.resume(config.resume_from_checkpoint)

    weights = concept_weights(cache.columns["concept"]) if "concept" in cache.columns else None
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = StepBatchSampler(len(cache), config.train_batch_size, config.seed, weights, start, rank, world)
    contrastive = ClipLoss(local_loss=world > 1, gather_with_grad=world > 1, rank=rank, world_size=world)

    def compute_loss(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed_for(config.seed, "clip", step, rank))
        images = augment(cache.images(indices), config.shift, config.noise, generator)
        chosen = cache.choose_captions(
            indices, torch.rand(len(indices), 2, generator=generator), config.canonical_caption
        )
        ids = tokenize(tokenizer, [cache.captions[i] for i in chosen])
        output = model(input_ids=ids.to(accelerator.device), pixel_values=images.to(accelerator.device))
        scale = accelerator.unwrap_model(model).logit_scale.clamp(max=4.6052).exp()  # at most 100, as CLIP
        return contrastive(output.image_embeds.float(), output.text_embeds.float(), scale), {}

    steps = fit(
        accelerator, model, optimizer, schedule, iter(sampler), compute_loss,
        max_train_steps=config.max_train_steps, start_step=start,
        max_grad_norm=config.max_grad_norm, seed=config.seed,
    )  # fmt: skip
    bar = tqdm(
        total=config.max_train_steps, initial=start, disable=not accelerator.is_main_process, unit="step"
    )
    mean = None
    for result in steps:
        mean = result.loss if mean is None else 0.98 * mean + 0.02 * result.loss
        bar.update()
        bar.set_postfix(loss=f"{mean:.3f}")
        if result.step % config.checkpointing_steps == 0 or result.step == config.max_train_steps:
            checkpoints.save(result.step)
    if accelerator.is_main_process:
        folder = Path(config.output_dir) / "clip"
        accelerator.unwrap_model(model).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        print(f"CLIP saved in {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
