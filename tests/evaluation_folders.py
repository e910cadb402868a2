"""What the tests of the evaluation share: folders of a judge, a data set in three splits and a model."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pipelines import DDPMScheduler, TextToImagePipeline

EMOJI64 = Path(__file__).resolve().parent / "data" / "emoji64"
COLUMNS = ("caption", "name", "concept", "style", "licence")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny CLIP of 16 x 16 pixels with random weights, saved with its tokenizer."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=24, **sizes, **ids
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=24, **sizes)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> Path:
    """The committed pictures in the three splits of the emoji set."""
    rows = [json.loads(line) for line in (EMOJI64 / "metadata.jsonl").read_text("utf-8").splitlines()]
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "heldout_compositions": []}
    for row in rows:
        split = {"pizza": "validation", "red apple": "heldout_compositions"}.get(row["name"], "train")
        content = (EMOJI64 / row["file_name"]).read_bytes()
        named = {"caption": row["text"]} | {key: row[key] for key in COLUMNS[1:]}
        splits[split].append({"image": {"bytes": content, "path": None}, **named})
    features = datasets.Features(
        {"image": datasets.Image()} | {key: datasets.Value("string") for key in COLUMNS}
    )
    parts = {split: datasets.Dataset.from_list(part, features=features) for split, part in splits.items()}
    folder = tmp_path_factory.mktemp("emoji")
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, _pixel_parts) -> Path:
    folder = tmp_path_factory.mktemp("model")
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    TextToImagePipeline(**_pixel_parts, scheduler=scheduler, default_guidance_scale=2.0).save_pretrained(
        folder
    )
    return folder
