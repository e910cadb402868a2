"""Train a small CLIP from scratch on captioned pictures.

    accelerate launch -m training.clip --config training/configs/clip.yaml
    accelerate launch -m training.clip --noised --config training/configs/noisy_clip.yaml

There are two such CLIPs. One is trained on the training split only, and its text tower conditions the image
model. The other is the judge: it has another size and seed, sees every split, and only scores pictures.

The first also learns from a sentence encoder (`--distill words`, `training.objectives.distillation`), so that
words that occur in no caption land near those that do. It learns from text alone for `text_steps`, then with
the contrastive loss as well.

With `--text_encoder`, an image tower is trained against an existing text tower, which stays frozen (LiT, Zhai
2022). The result is a CLIP that reads words as your pipeline does, to guide it or to rank its pictures.

With `--noised`, only an image tower is trained, on a model's noised pictures and against the model's own
frozen text tower (GLIDE, Nichol 2022, section 2.3). The result is the `noisy_clip` of CLIP guidance.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from open_clip.loss import ClipLoss
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from pipelines.components.noisy_clip import NoisyCLIP
from pipelines.folders.files import written_aside
from training.data.augmentation import augment
from training.data.caches import TextCache, cache_text
from training.data.pictures import PictureCache, cache_pictures, load_splits, seed_for
from training.data.tokenizer import build_clip_tokenizer
from training.evaluation.samples import load_pipeline
from training.objectives.distillation import Distillation, DistillationSettings, distillation_loss
from training.objectives.noised import NoisedPictures, text_width
from training.run.building import load_text_tower
from training.run.guides import TowerSettings, train_guide
from training.run.loop import Training
from training.run.optimizers import make_adamw
from training.run.settings import (
    CaptionSettings,
    PictureSettings,
    parse_config,
    require,
    run_command,
    setting,
)
from training.run.start import Run

MAX_LOGIT_SCALE = 4.6052  # the inverse of the temperature is at most 100, as in CLIP


class ClipTrainingConfig(TowerSettings, DistillationSettings, PictureSettings, CaptionSettings):
    """Settings of `training.clip`."""

    patch_size: int = 8
    vision_width: int = setting("Width of the image tower.", 256, "at least 1")
    vision_layers: int = setting("Layers of the image tower.", 6, "at least 1")
    text_width: int = setting("Width of the text tower.", 256, "at least 1")
    text_layers: int = setting("Layers of the text tower.", 6, "at least 1")
    head_dim: int = setting("Width of one attention head in both towers.", 64, "at least 1")
    num_merges: int = setting("How many of CLIP's merges the vocabulary keeps.", 8192, "0 or more")
    context_length: int = setting("Tokens of a caption, start and end included.", 32, "at least 1")
    noise: float = setting("Augmentation: Gaussian noise up to this deviation.", 0.15, "0 or more")
    attention: str = setting("eager or sdpa; in bf16 on a CPU eager is faster.", "eager")
    text_steps: int = setting("Steps at the start that see no pictures, only the teacher.", 0)
    distill_weight: float = setting(
        "Weight of the distillation relative to the contrastive loss.", 10.0, "0 or more"
    )
    states_weight: float = setting(
        "Weight of the states that a U-Net reads, in the distillation.", 0.5, "0 or more"
    )
    start_from_teacher: bool = setting(
        "With distill: token vectors start as the teacher sees the tokens.", True
    )
    text_encoder: str | None = setting("A pipeline or CLIP whose text tower is used, frozen.", None)
    noised: bool = setting("Train a NoisyCLIP for pretrained_model_name_or_path instead.", False)
    train_batch_size: int = 256
    adam_weight_decay: float = 0.1

    def check(self) -> None:
        super().check()
        distils, head = self.distill != "none", self.head_dim
        require(self.vision_width % head == 0, "vision_width", self.vision_width, "a multiple of head_dim")
        if self.noised:
            require(not distils, "distill", self.distill, "none with noised")
            return
        require(self.text_width % head == 0, "text_width", self.text_width, "a multiple of head_dim")
        divides = self.resolution % self.patch_size == 0
        require(divides, "patch_size", self.patch_size, "a divisor of resolution")
        fits = 0 <= self.text_steps < self.max_train_steps and (distils or not self.text_steps)
        require(fits, "text_steps", self.text_steps, "0, or with distill fewer than max_train_steps")
        require(not (distils and self.text_encoder), "distill", self.distill, "none with text_encoder")


# ------------------------------------------------------------ the towers


def build_clip(config: ClipTrainingConfig, tower: CLIPTextModelWithProjection | None = None) -> "Towers":
    """A CLIP (Radford 2021) of the configured sizes, with the vocabulary of `training.data.tokenizer`. If
    `tower` is given, the text tower is a frozen copy of it."""
    vocabulary = config.num_merges + 514
    space = config.projection_dim if tower is None else tower.config.projection_dim

    def sizes(width: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": width // config.head_dim, "hidden_act": "gelu", "projection_dim": space,
        }  # fmt: skip

    text = tower.config if tower is not None else CLIPTextConfig(
        vocab_size=vocabulary, max_position_embeddings=config.context_length, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        **sizes(config.text_width, config.text_layers),
    )  # fmt: skip
    vision = CLIPVisionConfig(
        image_size=config.resolution, patch_size=config.patch_size,
        **sizes(config.vision_width, config.vision_layers),
    )  # fmt: skip
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    model = Towers(CLIPConfig(**both, projection_dim=space))
    if tower is not None:
        for part in ("text_model", "text_projection"):
            getattr(model, part).load_state_dict(getattr(tower, part).state_dict())
            getattr(model, part).requires_grad_(False)
    return model


class Towers(CLIPModel):
    """CLIPModel with the forward pass for training: text in several parts, with or without pictures."""

    def forward(  # type: ignore[override]
        self, input_ids: list[Tensor], pixel_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Ids in parts (B_i, L_i) -> text embeddings (B, 3, D) and image embeddings (B', D) or None, all
        l2-normalised.

        A text has three embeddings: its state at the first end of text (CLIP's `text_embeds`), the mean of
        its words' states, and the state at the last position, all through the text projection. The last two
        matter because a U-Net reads these states as well; the padding consists of ends of text.
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


# ------------------------------------------------------------ the loss


def tokenize_by_length(
    tokenizer: Any, texts: list[str], rows: int = 128, device: torch.device | str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """(parts, place): the ids of the texts in parts of `rows` texts of similar length. Each part is padded to
    its own longest text, so that there is little padding. Text i is row place[i] of the concatenated
    parts."""
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
    """The factor of the learning rate at a step. During the `text_steps`, it rises to 1 over `warmup` steps
    and then stays constant. When the pictures start, it rises to 1 again for the image tower, and then
    follows half a cosine to 0 at `total`."""
    if step < text_steps:
        return min(1.0, (step + 1) / max(1, warmup))
    done = step - text_steps
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / max(1, total - text_steps - warmup))


def contrastive_loss(run: Run, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford 2021, figure 3) over the pairs of all processes."""
    several = run.world > 1
    loss = ClipLoss(local_loss=several, gather_with_grad=several, rank=run.rank, world_size=run.world)
    return loss(images, texts, scale)


@dataclass
class ClipTrainingLoss:
    """The contrastive loss of a micro-batch of pictures, from step `text_steps` on, plus distill_weight times
    the distance between the teacher's embeddings and the tower's, for the micro-batch's captions and other
    texts."""

    config: ClipTrainingConfig
    run: Run
    model: torch.nn.Module
    pictures: PictureCache
    tokenizer: CLIPTokenizer
    distillation: Distillation | None

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        config, run, distillation = self.config, self.run, self.distillation
        generator = torch.Generator().manual_seed(seed_for(config.seed, "clip", step, run.rank))
        images, texts, rows = None, [], torch.zeros(0, dtype=torch.long)
        if step >= config.text_steps:
            images = augment(self.pictures.images(indices), config.shift, config.noise, generator)
            images = images.to(run.device)
            draws = torch.rand(len(indices), 2, generator=generator)
            chosen = self.pictures.choose_captions(indices, draws, config.canonical_caption)
            texts = [self.pictures.captions[i] for i in chosen]
        if distillation is not None:
            own = distillation.batches.global_batch(step, run.world).chunk(run.world)[run.rank]
            rows = torch.cat([torch.tensor([distillation.row[text] for text in texts]).long(), own])
            texts = texts + [distillation.texts[i] for i in own]
        parts, place = tokenize_by_length(self.tokenizer, texts, device=run.device)
        text_embeds, image_embeds = self.model(parts, images)
        text_embeds = text_embeds[place.to(run.device)]  # (B + distilled, 3, D)
        loss, details = text_embeds.new_zeros(()), {}
        if image_embeds is not None:
            scale = run.accelerator.unwrap_model(self.model).logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            loss = contrastive_loss(run, image_embeds, text_embeds[: len(image_embeds), 0], scale)
            details["contrastive"] = float(loss.detach())
        if distillation is not None:
            targets = distillation.targets(rows).to(run.device)
            distance = distillation_loss(text_embeds, targets, config.states_weight)
            loss = loss + config.distill_weight * distance
            details["distance"] = float(distance.detach())
        return loss, details


@dataclass
class NoisyClipLoss:
    """The contrastive loss of a micro-batch of noised pictures and the pooled text of their captions."""

    config: ClipTrainingConfig
    pictures: NoisedPictures
    captions: TextCache
    run: Run
    model: torch.nn.Module

    def __call__(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        config, run, data = self.config, self.run, self.pictures.data
        x_t, t = self.pictures.batch(indices, config.seed, step, run.rank, run.world, config.shift)
        generator = torch.Generator().manual_seed(seed_for(config.seed, "captions", step, run.rank))
        draws = torch.rand(len(indices), 2, generator=generator)
        rows = data.choose_captions(indices, draws, config.canonical_caption).tolist()
        pooled = self.captions([data.captions[i] for i in rows])[1]
        texts = F.normalize(pooled.float(), dim=-1).to(run.device)
        images = self.model(x_t.to(run.device), t.to(run.device))
        scale = run.accelerator.unwrap_model(self.model).scale
        return contrastive_loss(run, images, texts, scale), {"scale": float(scale.detach())}


# ------------------------------------------------------------ the runs


def train_noised(config: ClipTrainingConfig, run: Run) -> None:
    """Train with `--noised`; its sizes are patch_size (of x_t), vision_width, vision_layers and head_dim."""
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    side = pipe.unet.config.sample_size
    fits = isinstance(side, int) and side % config.patch_size == 0
    require(fits, "patch_size", config.patch_size, f"a divisor of {side}, the side of what the U-Net sees")
    pictures = NoisedPictures(pipe, config.dataset, config.splits, config.cache_dir)
    captions = cache_text(pictures.data.captions, pipe.tokenizer, pipe.text_encoder, config.cache_dir)
    set_seed(config.seed)  # so that the weights depend on nothing else
    model = NoisyCLIP(
        sample_size=side, in_channels=pictures.channels, patch_size=config.patch_size,
        width=config.vision_width, layers=config.vision_layers,
        heads=config.vision_width // config.head_dim, projection_dim=text_width(pipe),
    )  # fmt: skip
    make_loss = functools.partial(NoisyClipLoss, config, pictures, captions)
    train_guide(config, run, model, pictures, make_loss, "noisy_clip")


def start_distillation(config: ClipTrainingConfig, pictures: PictureCache, run: Run) -> Distillation | None:
    """The texts and targets that the text tower learns from the teacher; None without `distill`."""
    if config.distill == "none":
        return None
    distillation = Distillation(config, pictures.captions, {"concept", "name"} <= pictures.columns.keys())
    if run.is_main:
        counts = ", ".join(f"{len(own)} {kind}" for kind, own in distillation.lists.items())
        print(f"distilling {counts}; the basis holds {distillation.energy:.3f} of the teacher's energy")
    return distillation


def save_clip(run: Run, trained: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    plain = CLIPModel(trained.config)  # so that the saved config names transformers' class
    plain.load_state_dict(trained.state_dict())
    with written_aside(run.output / "clip") as partial:
        plain.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
    print(f"CLIP saved in {run.output / 'clip'}")


def main() -> None:
    # 1. Settings, processes.
    config = parse_config(ClipTrainingConfig)
    config.check()
    run = Run(config)
    if config.noised:
        return train_noised(config, run)
    if run.accelerator.ddp_handler is not None:  # a step without pictures does not use the image tower
        run.accelerator.ddp_handler.find_unused_parameters = config.text_steps > 0

    # 2. Pictures, teacher, towers.
    data = load_splits(config.dataset, config.splits)
    pictures = cache_pictures(data, config.resolution, config.cache_dir, "image", "caption")
    distillation = start_distillation(config, pictures, run)
    if config.text_encoder:
        tokenizer, tower = load_text_tower(config.text_encoder)
    else:
        tokenizer, tower = build_clip_tokenizer(config.num_merges, config.context_length), None
    model = build_clip(config, tower)
    if distillation is not None and config.start_from_teacher:
        distillation.start_table(model.text_model, tokenizer)
    model.set_attn_implementation(config.attention)

    # 3. Train.
    optimizer = make_adamw(model, config.learning_rate, config.adam_weight_decay)
    warm_up, total = config.lr_warmup_steps, config.max_train_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warm_up, config.text_steps, total)
    )
    training = Training(run, [model], optimizer, schedule, "clip", total)
    loss = ClipTrainingLoss(config, run, training.models[0], pictures, tokenizer, distillation)
    for _ in training.steps(run.batches(pictures, training.start), loss, config.max_grad_norm):
        pass
    if run.is_main:
        save_clip(run, run.accelerator.unwrap_model(training.models[0]), tokenizer)
    run.accelerator.end_training()


if __name__ == "__main__":
    run_command(main, "training.clip")
