"""The model card: README.md of a folder, with the front matter that the Hub reads."""

import json
import os
from pathlib import Path
from typing import Any

import torch

PROMPT = "a corgi in a party hat"  # for the Hub page's widget, unless the front matter has its own
# What a card inherits from the card of the model that was loaded. Results are not inherited: they were
# probably measured on other weights.
INHERITED = ("license", "license_name", "license_link", "base_model", "datasets", "language", "widget")

WITH_CODE = """
`trust_remote_code=True` runs the code in this repository, which you can read there. With the `pipelines`
package that saved it, `{cls}.from_pretrained("{name}")` loads it without running any.
"""


class ModelCardMixin:
    """`make_card` of a pipeline. `_model_card` and `_loaded_name` are set by from_pretrained."""

    config: Any
    components: dict[str, Any]
    _model_card: str | None = None  # the text of the loaded model's card
    _loaded_name: str | None = None  # its name on the Hub, None for a local folder

    def make_card(
        self, name: str, has_code: bool, card: str | None = None,
        given: dict[str, Any] | str | os.PathLike | None = None,
    ) -> str:  # fmt: skip
        """The text of README.md.

        Args:
            name: the model's name, that of its folder or on the Hub.
            has_code: whether diffusers needs `trust_remote_code` to load it.
            card: the text of the folder's own card, kept as it is except for the fields in `given`.
            given: front matter as huggingface_hub's ModelCardData takes it, or a Markdown file to copy.

        Raises ValueError for front matter, given or in `card`, that cannot be read, and for a file that is
        not in UTF-8.
        """
        from huggingface_hub import ModelCard, ModelCardData
        from yaml import YAMLError

        if not (given is None or isinstance(given, dict)):
            try:
                return Path(given).read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                why = f"`model_card` must be a file in UTF-8, and {given} is none: {error}"
                raise ValueError(why) from error
        fields = dict(given or {})
        if fields.get("eval_results"):
            fields.setdefault("model_name", name)
        if card is not None:
            if not fields:
                return card
            try:
                kept = ModelCard(card)
            except (YAMLError, ValueError, TypeError) as error:
                raise ValueError(
                    "`model_card` cannot be merged into the README.md that is there: its front matter cannot "
                    f"be read ({error}). Mend it, or pass a Markdown file to take its place"
                ) from error
            kept.data = ModelCardData(**(kept.data.to_dict() | ModelCardData(**fields).to_dict()))
            return str(kept)
        general: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
        general |= {"tags": ["text-to-image", "diffusers"], "widget": [{"text": PROMPT}]}
        data = ModelCardData(**(general | self._inherited_fields(name) | fields))
        return f"---\n{data.to_yaml()}\n---\n\n{self._card_body(name, has_code, data)}"

    def _inherited_fields(self, name: str) -> dict[str, Any]:
        from huggingface_hub import ModelCard
        from yaml import YAMLError

        fields: dict[str, Any] = {}
        if self._model_card:
            try:
                fields = ModelCard(self._model_card, ignore_metadata_errors=True).data.to_dict()
            except (YAMLError, ValueError, TypeError):  # somebody else's broken card is no reason not to save
                fields = {}
        fields = {key: fields[key] for key in INHERITED if well_formed(key, fields.get(key))}
        if self._loaded_name not in (None, name):
            fields["base_model"] = self._loaded_name
        return fields

    def _card_body(self, name: str, has_code: bool, data: Any) -> str:
        config = self.config
        scale, steps = config["default_guidance_scale"], config["default_num_inference_steps"]
        widget = [one for one in data.get("widget") or [] if isinstance(one, dict)]
        prompt = next((str(one["text"]) for one in widget if one.get("text")), PROMPT)
        trust = ", trust_remote_code=True" if has_code else ""
        modules = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
        lines = [
            f"# {name.split('/')[-1]}\n",
            f"Draws pictures from prompts; {parameters / 1e6:.1f} million parameters in all.\n",
            "```python\nfrom diffusers import DiffusionPipeline\n",
            f'pipe = DiffusionPipeline.from_pretrained("{name}"{trust})',
            f"pipe({json.dumps(prompt, ensure_ascii=False)}, guidance_scale={scale}, "
            f"num_inference_steps={steps}).images[0]",
            "```",
        ]
        if has_code:
            lines += WITH_CODE.format(name=name, cls=type(self).__name__).splitlines()
        sections = {"Base model": data.base_model, "Data": data.datasets, "Licence": data.license}
        for title, value in sections.items():
            if value:
                listed = value if isinstance(value, list) else [value]
                lines += ["", f"## {title}", "", ", ".join(map(str, listed))]
        if data.eval_results:
            lines += ["", "## Results", "", "| metric | value | on |", "|---|---|---|"]
            for result in data.eval_results:
                metric = result.metric_name or result.metric_type
                lines.append(f"| {metric} | {result.metric_value} | {result.dataset_name} |")
        return "\n".join(lines) + "\n"


def well_formed(key: str, value: Any) -> bool:
    """Whether an inherited front matter field is not empty and has the form that the Hub accepts."""
    if key == "widget":
        return bool(value) and isinstance(value, list) and all(isinstance(one, dict) for one in value)
    listed = value if isinstance(value, list) else [value]
    return bool(value) and all(isinstance(one, str) for one in listed)
