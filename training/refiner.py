"""Train a U-Net's refiner of pixels alone, its other weights frozen.

    python -m training.refiner --config training/configs/refiner.yaml
    python -m training.export --config training/configs/emoji_wide.yaml --unets runs/refiner/unet --to FOLDER

What the frozen network predicts is computed once, for a fixed set of noised pictures, so that a step costs a
small part of a step of `training.text_to_image`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from pipelines import TextToImagePipeline
from pipelines.conditioning import encode_text
from training.building import add_refiner
from training.config import parse_config, require, run
from training.data import cache_pictures, concept_weights, load_pictures, seed_for
from training.denoising import plain_attention, training_scheduler
from training.loop import has_bf16
from training.losses import detail_loss, simple_loss
from training.noised import train_tower
from training.samples import load_pipeline


@dataclass
class RefinerConfig:
    """Settings of `training.refiner`."""

    output_dir: str = field(metadata={"help": "The trained U-Net, as unet, and its checkpoints go here."})
    pretrained_model_name_or_path: str = field(
        default="models/emoji", metadata={"help": "A pipeline of pixels that predicts x0."}
    )
    refiner_channels: int = field(default=32, metadata={"help": "Width of a U-Net's that has none yet."})
    dataset: str = field(
        default="data/emoji", metadata={"help": "Saved data set, picture folder or Hub name."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    cache_dir: str = field(default="data/cache", metadata={"help": "Decoded pictures, computed once."})
    num_samples: int = field(default=5000, metadata={"help": "Noised pictures, chosen as training does."})
    max_timestep: int = field(
        default=320, metadata={"help": "t is even below it; above, where noise hides the picture, it is off."}
    )
    detail_weight: float = field(default=0.5, metadata={"help": "Of |error of x0|, beside squared_weight."})
    squared_weight: float = field(default=5.0, metadata={"help": "Of the squared error: min-SNR's gamma."})
    train_batch_size: int = field(default=64, metadata={"help": "Pictures of a step."})
    max_train_steps: int = field(default=2500, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak of the cosine schedule."})
    lr_warmup_steps: int = field(default=50, metadata={"help": "Steps of linear warm-up."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, fp16, bf16, or auto: bf16 if fast here; default accelerate's."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "Save every so many steps."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' or a folder."})
    seed: int = field(default=0, metadata={"help": "Seed of pictures, t, eps, weights and batches."})

    def check(self) -> None:
        """Raise a ValueError that names the argument, for everything that can be told before work starts."""
        for name in (
            "refiner_channels", "num_samples", "max_timestep", "train_batch_size", "max_train_steps",
            "checkpointing_steps",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("detail_weight", "squared_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")


class Predictions:
    """Noised pictures, and what the U-Net without its refiner predicts of each: the refiner's inputs.

    `prediction`, `x_t` and `x0` are (N, 3, H, W), `emb` (N, E); every other batch is predicted with the
    U-Net's own first estimate of x0 beside x_t, where it is self-conditioned.
    """

    def __init__(self, pipe: TextToImagePipeline, config: RefinerConfig) -> None:
        side = pipe.unet.config.sample_size
        pictures = cache_pictures(
            load_pictures(config.dataset, config.split), side, config.cache_dir, "image", "caption"
        )
        concepts = pictures.columns.get("concept", [str(i) for i in range(len(pictures))])
        generator = torch.Generator().manual_seed(seed_for(config.seed, "refiner"))
        chosen = torch.multinomial(concept_weights(concepts), config.num_samples, True, generator=generator)
        chain = training_scheduler(pipe.scheduler)
        limit = min(config.max_timestep, len(chain))
        parts: dict[str, list[Tensor]] = {"prediction": [], "x_t": [], "x0": [], "emb": []}
        fast = config.mixed_precision in ("auto", "bf16") and has_bf16("cpu")
        bar = tqdm(total=len(chosen), desc="predicting", unit="picture")
        for number, indices in enumerate(part.tolist() for part in chosen.split(50)):
            x0 = pictures.images(indices)
            t = torch.randint(0, limit, (len(x0),), generator=generator)
            x_t = chain.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
            captions = [pictures.captions[pictures.choices[i][0]] for i in indices]
            prediction, emb = predict(pipe, x_t, t, captions, number % 2 == 1, fast)
            for name, value in {"prediction": prediction, "x_t": x_t, "x0": x0, "emb": emb}.items():
                parts[name].append(value)
            bar.update(len(x0))
        bar.close()
        self.prediction, self.x_t, self.x0, self.emb = (torch.cat(part) for part in parts.values())
        self.columns: dict[str, Any] = {}  # they are drawn by their concepts already

    def __len__(self) -> int:
        return len(self.x0)


@torch.no_grad()
def predict(
    pipe: TextToImagePipeline, x_t: Tensor, t: Tensor, captions: list[str], estimated: bool, fast: bool
) -> tuple[Tensor, Tensor]:
    """(x0 as the U-Net without a refiner predicts it, (B, 3, H, W); its time embedding, (B, E)); in bf16 if
    `fast`."""
    unet = pipe.unet
    refiner, unet.refiner = unet.refiner, None
    try:
        states, pooled = encode_text(pipe.tokenizer, pipe.text_encoder, captions)[:2]
        added = {"pooled_text": pooled.float()} if pipe.requires_pooled_text else {}
        with plain_attention(x_t.device), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            x0 = unet(x_t, t, states.float(), added_cond_kwargs=added).sample
            if estimated and unet.config.get("self_conditioning", False):
                again = added | {"x0_self": x0.float().clamp(-1, 1)}
                x0 = unet(x_t, t, states.float(), added_cond_kwargs=again).sample
        return x0.float(), unet.embed_time(x_t, t, None, None, added)
    finally:
        unet.refiner = refiner


def refiner_loss(output: Tensor, x0: Tensor, config: RefinerConfig) -> Tensor:
    """squared_weight mean (output - x0)^2 + detail_weight mean |output - x0| of each picture, (B,)."""
    squared = simple_loss(output, x0)
    every = torch.ones_like(squared)
    return config.squared_weight * squared + config.detail_weight * detail_loss(output, x0, every, 0.0)


def main() -> None:
    config = parse_config(RefinerConfig)
    config.check()
    pipe = load_pipeline(config.pretrained_model_name_or_path)
    name, kind = "pretrained_model_name_or_path", pipe.scheduler.config.prediction_type
    fits = pipe.vae is None and kind == "sample"
    require(fits, name, config.pretrained_model_name_or_path, "a pipeline of pixels that predicts x0")
    set_seed(config.seed)
    if pipe.unet.refiner is None:
        pipe.unet = add_refiner(pipe.unet, config.refiner_channels, config.max_timestep)
    unet = pipe.unet.requires_grad_(False).eval()
    pictures: Any = Predictions(pipe, config)
    unet.refiner.requires_grad_(True)

    def make_loss(accelerator: Any, trained: Any) -> Any:
        alone = accelerator.num_processes == 1  # it is called by itself, which DDP does not see
        require(alone, "num_processes", accelerator.num_processes, "1: a refiner is trained in minutes")
        device = accelerator.device

        def compute_loss(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
            prediction, x_t, emb, x0 = (
                part[indices].to(device)
                for part in (pictures.prediction, pictures.x_t, pictures.emb, pictures.x0)
            )
            with accelerator.autocast():
                output = trained.refiner(prediction, x_t, emb, 0)
            loss = refiner_loss(output, x0, config).mean()
            error, before = (simple_loss(x.detach(), x0).mean().sqrt() for x in (output, prediction))
            return loss, {"error": float(error), "error before": float(before)}

        return compute_loss

    train_tower(config, unet, pictures, make_loss, "unet")


if __name__ == "__main__":
    run(main, "training.refiner")
