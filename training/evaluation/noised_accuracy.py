"""How well a noised CLIP and a noisy classifier read a picture at each noise level.

python -m training.evaluate noised-accuracy --model models/emoji --output accuracy.png
"""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import TextToImagePipeline
from pipelines.drawing.images import decode_latents
from training.evaluation.figures import chart, finish
from training.evaluation.judge import Judge, embed_concepts, recall
from training.evaluation.samples import with_guides
from training.evaluation.settings import BatchSettings, CountSettings, GuidesSettings, JudgedSettings
from training.objectives.denoising import BUCKETS
from training.objectives.noised import NoisedPictures, embed_prompts
from training.run.settings import require, setting


class NoisedAccuracyConfig(JudgedSettings, GuidesSettings, CountSettings, BatchSettings):
    """Settings of `training.evaluate noised-accuracy`."""

    label_column: str = setting("Column of the classifier's classes, of one set.", "group")
    num_pictures: int = 400
    batch_size: int = 100


class PipelineTexts:
    """The text tower that a NoisyCLIP goes with, in the form that `embed_concepts` expects."""

    def __init__(self, pipe: TextToImagePipeline) -> None:
        self.pipe = pipe

    def embed_texts(self, texts: list[str]) -> Tensor:
        return embed_prompts(self.pipe, texts)

    embed_names = Judge.embed_names


@torch.no_grad()
def noised_accuracy(config: NoisedAccuracyConfig) -> dict[str, Any]:
    """Accuracy at ten noise levels, in the middle of each tenth of the chain: how often the noised CLIP, and
    on the same pictures the clean one, ranks a noised picture's concept first or among the first five of all
    concepts, and the share of pictures that the classifier puts in the right class."""
    pipe = with_guides(config.model, config.noisy_clip, config.noisy_classifier)
    noisy, classifier = pipe.noisy_clip, pipe.noisy_classifier
    require(noisy is not None or classifier is not None, "noisy_clip", config.noisy_clip, "given")
    pictures = NoisedPictures(pipe, config.dataset, config.split, config.cache_dir)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(pictures), generator=generator)[: config.num_pictures].tolist()
    truth = [pictures.columns["concept"][i] for i in chosen]
    judge = Judge(config.judge)

    def read_clean(x: Tensor, t: int) -> Tensor:
        return judge.embed_images(decode_latents(pipe.vae, x))

    readers: dict[str, tuple[Any, Any]] = {"clean CLIP": (embed_concepts(judge, config.dataset), read_clean)}
    if noisy is not None:
        readers["noised CLIP"] = embed_concepts(PipelineTexts(pipe), config.dataset), noisy
    total = len(pictures.chain)
    levels = [(2 * bucket + 1) * total // (2 * BUCKETS) for bucket in range(BUCKETS)]
    figures: dict[str, Any] = {"split": config.split, "pictures": len(chosen), "t": levels}
    figures |= {reader: {"R@1": [], "R@5": []} for reader in readers}
    if classifier is not None:
        labels, values = list(classifier.config.labels), pictures.columns.get(config.label_column, [])
        own, rule = set(values), f"a column of the classifier's classes, {labels}"
        require(len(own) > 0 and own <= set(labels), "label_column", config.label_column, rule)
        places = [i for i, label in enumerate(labels) if label in own]
        classes = torch.tensor([labels.index(values[i]) for i in chosen])
        figures["classifier"] = {"accuracy": []}
    x0 = pictures.data.images(chosen)
    eps = torch.randn(x0.shape, generator=generator)
    for t in tqdm(levels, desc="noise levels", unit="level"):
        x_t = pictures.chain.add_noise(x0, eps, torch.tensor(t)).split(config.batch_size)
        for reader, (concepts, embed) in readers.items():
            ranks = concepts.rank(torch.cat([embed(part, t) for part in x_t]), truth)
            for name, share in recall(ranks).items():
                figures[reader][name].append(share)
        if classifier is not None:
            best = torch.cat([classifier(part, t)[:, places].argmax(-1) for part in x_t])
            found = torch.tensor(places)[best]
            figures["classifier"]["accuracy"].append(float((found == classes).double().mean()))
    if config.output:
        draw_accuracy(figures, config.output)
    return figures


def draw_accuracy(figures: dict[str, Any], path: str) -> None:
    """Plot a curve for each reader and metric against t."""
    with chart(path, 6, 3.5) as ax:
        for reader, own in figures.items():
            for name, values in own.items() if isinstance(own, dict) else ():
                ax.plot(figures["t"], values, marker="o", label=f"{reader}, {name}")
        finish(ax, 10, xlabel="t", ylabel="share of noised pictures", ylim=(0, 1))
