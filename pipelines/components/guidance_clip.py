"""A clean CLIP for guidance: open_clip's models or transformers' CLIPModel behind one interface.

The tokenizer's files are saved beside the weights. open_clip is imported only for its own models and need
not be installed for others.
"""

import os
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..folders.files import read_json

NEITHER = (
    "must be a folder of a transformers or open_clip CLIP, or open_clip's name of one, such as "
    "'ViT-B-32/laion2b_s34b_b79k' or 'hf-hub:OWNER/NAME'"
)


class GuidanceCLIP(ModelMixin, ConfigMixin):
    """Pictures in [-1, 1] and texts -> l2-normalised embeddings in one space.

    `GuidanceCLIP.load(name)` makes one; `save_pretrained` and `from_pretrained` are diffusers'.

    Args:
        library: "transformers" or "open_clip".
        architecture: the library's config of the model: CLIPConfig as a mapping, or open_clip's model config.
        image_mean, image_std: mean and standard deviation of each channel, to normalise pictures in [0, 1].
    """

    tokenizer: Any = None

    @register_to_config
    def __init__(
        self,
        library: str = "transformers", architecture: dict[str, Any] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5), image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:  # fmt: skip
        super().__init__()
        architecture = dict(architecture or {})
        if library == "transformers":
            self.model = CLIPModel(CLIPConfig(**architecture))
        elif library == "open_clip":
            model = import_module("open_clip.model")
            settings = {key: value for key, value in architecture.items() if key != "custom_text"}
            cls = model.CustomTextCLIP if "custom_text" in architecture else model.CLIP
            self.model = cls(**settings)
            tokenizers, text = import_module("open_clip.tokenizer"), architecture["text_cfg"]
            length = {"context_length": text.get("context_length", 77)}
            name = text.get("hf_tokenizer_name")
            tokenizer = partial(tokenizers.HFTokenizer, name) if name else tokenizers.SimpleTokenizer
            self.tokenizer = tokenizer(**length)
        else:
            raise ValueError(f"library must be 'transformers' or 'open_clip', got {library!r}")

    # ---- loading and saving

    @classmethod
    def load(cls, name: str | os.PathLike) -> "GuidanceCLIP":
        """Load a folder of transformers' CLIPModel or of open_clip, or a model by its open_clip name.

        open_clip's names are MODEL/WEIGHTS or hf-hub:OWNER/NAME. A transformers CLIP without a
        preprocessor_config.json sees pictures as they are, in [-1, 1].
        Raises ValueError if `name` is none of these.
        """
        folder = Path(name)
        if (folder / "config.json").is_file() and "text_config" in read_json(folder / "config.json"):
            model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32)
            processor = folder / "preprocessor_config.json"
            settings = read_json(processor) if processor.is_file() else {}
            kept = {key: settings[key] for key in ("image_mean", "image_std") if key in settings}
            return cls.of(model, CLIPTokenizer.from_pretrained(str(folder)), **kept)
        open_clip = import_module("open_clip")
        is_folder = (folder / "open_clip_config.json").is_file()
        place, _, weights = str(name).partition("/")
        if is_folder or str(name).startswith("hf-hub:"):
            place, weights = f"local-dir:{folder}" if is_folder else str(name), ""
        elif not weights or place not in open_clip.list_models():
            raise ValueError(f"clip_guidance_model {NEITHER}, got {str(name)!r}")
        model = open_clip.create_model(place, pretrained=weights or None)
        return cls.of(model, config=open_clip.get_model_config(place))

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any = None, image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None, config: dict[str, Any] | None = None,
    ) -> "GuidanceCLIP":  # fmt: skip
        """Wrap a CLIPModel and its tokenizer, or an open_clip model and its config; weights are shared."""
        ready = isinstance(model, CLIPModel)
        own = getattr(getattr(model, "visual", None), "preprocess_cfg", None) or {}
        architecture = model.config.to_dict() if ready else dict(config or {})
        for key in ("_name_or_path", "transformers_version"):  # specific to this machine
            architecture.pop(key, None)
        mean = tuple(image_mean or own.get("mean", (0.5, 0.5, 0.5)))
        std = tuple(image_std or own.get("std", (0.5, 0.5, 0.5)))
        with torch.device("meta"):  # replaced at once
            made = cls("transformers" if ready else "open_clip", architecture, mean, std)
        made.model = model.eval()
        made.tokenizer = made.tokenizer if tokenizer is None else tokenizer
        return made.eval()

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str = "10GB", **kwargs: Any,
    ) -> None:  # fmt: skip
        """As in diffusers, with the tokenizer's files beside the weights."""
        options = {"safe_serialization": safe_serialization, "variant": variant}
        super().save_pretrained(str(save_directory), max_shard_size=max_shard_size, **options, **kwargs)
        if self.config.library == "transformers":
            self.tokenizer.save_pretrained(str(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "GuidanceCLIP":
        """As in diffusers, from a folder."""
        made = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if made.config.library == "transformers":
            folder = Path(str(pretrained_model_name_or_path)) / (kwargs.get("subfolder") or "")
            made.tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        return made

    # ---- embeddings

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale): what multiplies the dot product of a picture and a text."""
        return self.model.logit_scale.exp()

    @property
    def image_size(self) -> int:
        """Side of the pictures that it sees, in pixels."""
        if self.config.library == "transformers":
            return self.model.config.vision_config.image_size
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def embed_images(self, images: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) in [-1, 1] -> (N, D). Gradients flow."""
        mean, std = (
            torch.tensor(list(values), device=images.device)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        pixels = ((images.float() * 0.5 + 0.5 - mean) / std).to(self.dtype)
        if self.config.library == "transformers":
            features = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        else:
            features = self.model.encode_image(pixels)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """N texts -> (N, D)."""
        if self.config.library == "transformers":
            length = self.model.config.text_config.max_position_embeddings
            options = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
            ids = self.tokenizer(texts, **options).input_ids
            output = self.model.get_text_features(input_ids=ids.to(self.device))
            features = output if isinstance(output, Tensor) else output.pooler_output
        else:
            features = self.model.encode_text(self.tokenizer(texts).to(self.device))
        return F.normalize(features.float(), dim=-1)

    def forward(self, images: Tensor, texts: list[str]) -> Tensor:
        """The logits of every picture with every text, (N, M)."""
        return self.scale * self.embed_images(images) @ self.embed_texts(texts).T
