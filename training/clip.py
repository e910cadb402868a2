"""Train a small CLIP from scratch on captioned pictures.

    accelerate launch -m training.clip --config training/configs/clip.yaml
    accelerate launch -m training.clip --noised --config training/configs/noisy_clip.yaml

Two are shipped or kept: one whose text tower conditions the image model, trained on the training split
only; and a judge, of another size and seed, that sees every split and only scores.

The first also learns from a sentence encoder (`--distill words`, `training.objectives.distillation`), so that words that
stand in no caption land by those that do: for `text_steps` on text alone, then beside the contrastive loss.

With `--text_encoder` an image tower is trained against a text tower that there is, which stays as it is
(Zhai 2022, LiT): a CLIP that reads words as a pipeline of yours does, to guide it or rank what it draws.

With `--noised` an image tower alone is trained, on a model's noised pictures, against the model's own text
tower, which stays as it is (GLIDE, Nichol 2022, section 2.3): the `noisy_clip` of CLIP guidance.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from open_clip.loss import ClipLoss
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from training.data.caches import cache_text
from training.data.pictures import (
    PictureCache,
    StepBatchSampler,
    cache_pictures,
    concept_weights,
    load_pictures,
    seed_for,
)
from training.data.tokenizer import build_clip_tokenizer
from training.evaluation.words import WORDNET_DIR
from training.objectives.distillation import Distillation, distillation_loss
from training.run.building import load_text_tower
from training.run.loop import Checkpoints, fit, make_accelerator
from training.run.settings import parse_config, require, run

DISTILL = ("none", "captions", "words")


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
    max_train_steps: int = field(default=2000, metadata={"help": "Optimizer steps, text_steps among them."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    lr_warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    adam_weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    shift: int = field(default=5, metadata={"help": "Augmentation: shift by up to this many pixels."})
    noise: float = field(
        default=0.15, metadata={"help": "Augmentation: Gaussian noise up to this deviation."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16, bf16, or auto: bf16 if fast here; default accelerate's."}
    )
    attention: str = field(
        default="eager", metadata={"help": "eager or sdpa; in bf16 on a CPU eager is faster."}
    )
    checkpointing_steps: int = field(default=200, metadata={"help": "Save every so many steps."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' or a folder."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches and captions."})
    distill: str = field(
        default="none",
        metadata={"help": "What the text tower learns from the sentence encoder: none, captions or words."},
    )
    text_steps: int = field(
        default=0, metadata={"help": "So many steps at the start see no pictures, only the teacher."}
    )
    distill_batch_size: int = field(
        default=512, metadata={"help": "Texts for each process and step, beside the pictures' captions."}
    )
    distill_weight: float = field(
        default=10.0, metadata={"help": "Weight of the distillation beside the contrastive loss."}
    )
    states_weight: float = field(
        default=0.5, metadata={"help": "Weight of the states that a U-Net reads, in the distillation."}
    )
    start_from_teacher: bool = field(
        default=True, metadata={"help": "With distill: token vectors start as the teacher sees the tokens."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Folder of the sentence encoder; by default PyPI's package of it."}
    )
    wordnet_dir: str = field(default=WORDNET_DIR, metadata={"help": "WordNet's own files."})
    npm_dir: str = field(default="data/npm", metadata={"help": "Where training.emoji keeps its packages."})
    text_encoder: str | None = field(
        default=None,
        metadata={"help": "A pipeline or CLIP whose text tower is taken, as it is; see the top."},
    )
    noised: bool = field(
        default=False, metadata={"help": "Train a NoisyCLIP for the model below instead; see the top."}
    )
    pretrained_model_name_or_path: str = field(
        default="models/emoji",
        metadata={"help": "Noised: the pipeline whose text tower, schedule and space are taken."},
    )


def build_clip(config: ClipTrainingConfig, tower: Any = None) -> "Towers":
    """A CLIP (Radford 2021) of the sizes asked for; its vocabulary is `training.data.tokenizer`'s. With a `tower`,
    a CLIPTextModelWithProjection, its text tower is that, sizes and weights, and learns nothing."""
    vocabulary = config.num_merges + 514
    space = config.projection_dim if tower is None else tower.config.projection_dim
    shared: dict[str, Any] = {"hidden_act": "gelu", "projection_dim": space}
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
    if tower is not None:
        text = tower.config
    model = Towers(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=space)
    )
    if tower is not None:
        for part in ("text_model", "text_projection"):
            own = getattr(model, part)
            own.load_state_dict(getattr(tower, part).state_dict())
            own.requires_grad_(False)
    return model


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


class Towers(CLIPModel):
    """CLIPModel with the forward pass that training needs: text in parts, pictures or none."""

    def forward(  # type: ignore[override]
        self, input_ids: list[Tensor], pixel_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Parts (B_i, L_i) of ids -> l2-normalised texts (B, 3, D) and images (B', D) or None.

        A text is embedded by its state at the first end of text (CLIP's `text_embeds`), by the mean of its
        words' states, and by the state at the last position, all through the text projection. A U-Net reads
        the last two kinds as well: the padding is ends of text.
        """
        rows = []
        for ids in input_ids:
            states = self.text_model(input_ids=ids).last_hidden_state  # (B_i, L_i, W)
            end = (ids == self.config.text_config.eos_token_id).int().argmax(dim=1)
            position = torch.arange(ids.shape[1], device=ids.device)
            inside = ((position > 0) & (position < end[:, None])).to(states.dtype)  # (B_i, L_i)
            mean = (states * inside[:, :, None]).sum(1) / inside.sum(1, keepdim=True).clamp(min=1)
            first = states[torch.arange(len(ids), device=ids.device), end]
            rows.append(self.text_projection(torch.stack([first, mean, states[:, -1]], dim=1)))
        texts = F.normalize(torch.cat(rows).float(), dim=-1)
        if pixel_values is None:
            return texts, None
        images = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        return texts, F.normalize(images.float(), dim=-1)


def tokenize_by_length(
    tokenizer: Any, texts: list[str], rows: int = 128, device: torch.device | str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """(parts, place): texts of like length together, `rows` at a time, each part padded to its own longest,
    so that little is padding; text i is row place[i] of the parts laid end to end."""
    ids = tokenizer(texts, truncation=True).input_ids
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    parts = []
    for start in range(0, len(order), rows):
        part = [ids[i] for i in order[start : start + rows]]
        longest = len(part[-1])
        padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in part]
        parts.append(torch.tensor(padded, device=device))
    return parts, torch.tensor(order).argsort()


def learning_rate_factor(step: int, warmup: int, text_steps: int, total: int) -> float:
    """Warm-up to 1 over the first `warmup` steps, flat until the pictures come; then the same warm-up for the
    image tower, and half a cosine down to 0 at `total`."""
    if step < text_steps:
        return min(1.0, (step + 1) / max(1, warmup))
    done = step - text_steps
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / max(1, total - text_steps - warmup))


def load_splits(config: ClipTrainingConfig) -> PictureCache:
    import datasets

    parts = [load_pictures(config.dataset, split) for split in config.splits.split("+")]
    data = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return cache_pictures(data, config.resolution, config.cache_dir, "image", "caption")


def train_noised(config: ClipTrainingConfig) -> None:
    """`--noised`: of the sizes only patch_size (of x_t), vision_width, vision_layers and head_dim count."""
    from pipelines.components.noisy_clip import NoisyCLIP
    from training.evaluation.samples import load_pipeline
    from training.objectives.noised import NoisedPictures, text_width, train_tower

    require(config.distill == "none", "distill", config.distill, "none with noised")
    width, head = config.vision_width, config.head_dim
    require(width % head == 0, "vision_width", width, "a multiple of head_dim")
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    side = pipe.unet.config.sample_size
    fits = isinstance(side, int) and side % config.patch_size == 0
    require(fits, "patch_size", config.patch_size, f"a divisor of {side}, the side of what the U-Net sees")
    pictures = NoisedPictures(pipe, config.dataset, config.splits, config.cache_dir)
    captions = cache_text(pictures.data.captions, pipe.tokenizer, pipe.text_encoder, config.cache_dir)
    set_seed(config.seed)
    model = NoisyCLIP(
        sample_size=side,
        in_channels=pictures.channels,
        patch_size=config.patch_size,
        width=width,
        layers=config.vision_layers,
        heads=width // head,
        projection_dim=text_width(pipe),
    )

    def make_loss(accelerator: Any, trained: Any) -> Any:
        rank, world = accelerator.process_index, accelerator.num_processes
        contrastive = ClipLoss(local_loss=world > 1, gather_with_grad=world > 1, rank=rank, world_size=world)

        def compute_loss(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
            x_t, t = pictures.batch(indices, config.seed, step, rank, world, config.shift)
            generator = torch.Generator().manual_seed(seed_for(config.seed, "captions", step, rank))
            draws = torch.rand(len(indices), 2, generator=generator)
            rows = pictures.data.choose_captions(indices, draws, config.canonical_caption).tolist()
            pooled = captions([pictures.data.captions[i] for i in rows])[1]
            texts = F.normalize(pooled.float(), dim=-1).to(accelerator.device)
            images = trained(x_t.to(accelerator.device), t.to(accelerator.device))
            scale = accelerator.unwrap_model(trained).scale
            return contrastive(images, texts, scale), {"scale": float(scale.detach())}

        return compute_loss

    train_tower(config, model, pictures, make_loss, "noisy_clip")


def main() -> None:
    config = parse_config(ClipTrainingConfig)
    if config.noised:
        train_noised(config)
        return
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
    require(config.distill in DISTILL, "distill", config.distill, "one of " + ", ".join(DISTILL))
    distils = config.distill != "none"
    require(
        0 <= config.text_steps < config.max_train_steps and (distils or not config.text_steps),
        "text_steps",
        config.text_steps,
        "0, or with distill fewer than max_train_steps",
    )
    require(not (distils and config.text_encoder), "distill", config.distill, "none with text_encoder")
    require(config.distill_batch_size >= 1, "distill_batch_size", config.distill_batch_size, "at least 1")
    require(config.distill_weight >= 0, "distill_weight", config.distill_weight, "at least 0")
    require(config.states_weight >= 0, "states_weight", config.states_weight, "at least 0")
    accelerator = make_accelerator(config.output_dir, config.mixed_precision)
    if accelerator.ddp_handler is not None:  # without pictures the image tower has no part in a step
        accelerator.ddp_handler.find_unused_parameters = config.text_steps > 0
    set_seed(config.seed)
    cache = load_splits(config)
    distillation = None
    if distils:
        distillation = Distillation(config, cache.captions, {"concept", "name"} <= cache.columns.keys())
        if accelerator.is_main_process:
            counts = ", ".join(f"{len(own)} {kind}" for kind, own in distillation.lists.items())
            print(f"distilling {counts}; the basis holds {distillation.energy:.3f} of the teacher's energy")
    tower = None
    if config.text_encoder:
        tokenizer, tower = load_text_tower(config.text_encoder)
    else:
        tokenizer = build_clip_tokenizer(config.num_merges, config.context_length)
    model = build_clip(config, tower)
    if distillation is not None and config.start_from_teacher:
        distillation.start_table(model.text_model, tokenizer)
    model.set_attn_implementation(config.attention)
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained_ones if p.ndim > 1]
    others = [p for p in trained_ones if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.adam_weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(
            step, config.lr_warmup_steps, config.text_steps, config.max_train_steps
        ),
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
        images, texts = None, []
        rows = torch.zeros(0, dtype=torch.long)
        if step >= config.text_steps:
            images = augment(cache.images(indices), config.shift, config.noise, generator)
            images = images.to(accelerator.device)
            rows = cache.choose_captions(
                indices, torch.rand(len(indices), 2, generator=generator), config.canonical_caption
            )
            texts = [cache.captions[i] for i in rows]
        if distillation is not None:
            own = distillation.batches.global_batch(step, world).chunk(world)[rank]
            rows = torch.cat([torch.tensor([distillation.row[text] for text in texts]).long(), own])
            texts = texts + [distillation.texts[i] for i in own]
        parts, place = tokenize_by_length(tokenizer, texts, device=accelerator.device)
        text_embeds, image_embeds = model(parts, images)
        text_embeds = text_embeds[place.to(accelerator.device)]  # (B + distilled, 3, D)
        loss, details = text_embeds.new_zeros(()), {}
        if image_embeds is not None:
            logit_scale = accelerator.unwrap_model(model).logit_scale
            scale = logit_scale.clamp(max=4.6052).exp()  # at most 100, as CLIP
            loss = contrastive(image_embeds, text_embeds[: len(image_embeds), 0], scale)
            details["contrastive"] = float(loss.detach())
        if distillation is not None:
            targets = distillation.targets(rows).to(accelerator.device)
            distance = distillation_loss(text_embeds, targets, config.states_weight)
            loss = loss + config.distill_weight * distance
            details["distance"] = float(distance.detach())
        return loss, details

    steps = fit(
        accelerator, model, optimizer, schedule, iter(sampler), compute_loss,
        max_train_steps=config.max_train_steps, start_step=start,
        max_grad_norm=config.max_grad_norm, seed=config.seed,
    )  # fmt: skip
    bar = tqdm(
        total=config.max_train_steps, initial=start, disable=not accelerator.is_main_process, unit="step"
    )
    means: dict[str, float] = {}
    for result in steps:
        for name, value in {"loss": result.loss, **result.details}.items():
            means[name] = 0.98 * means.get(name, value) + 0.02 * value
        bar.update()
        bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
        if result.step % config.checkpointing_steps == 0 or result.step == config.max_train_steps:
            checkpoints.save(result.step)
    if accelerator.is_main_process:
        folder = Path(config.output_dir) / "clip"
        trained = accelerator.unwrap_model(model)
        plain = CLIPModel(trained.config)  # so that the saved config names transformers' class
        plain.load_state_dict(trained.state_dict())
        plain.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        print(f"CLIP saved in {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main, "training.clip")
