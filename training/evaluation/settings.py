"""Settings that several commands of `training.evaluate` share, in groups to inherit from."""

from pathlib import Path
from typing import Any

from training.run.settings import DataSettings, Rule, Settings, WordSettings, setting

OWN = "by default the model's own, or the one in the folder MODEL-guidance."
TRAINED = Rule(
    lambda folder: not folder or (Path(folder) / "config.json").is_file(), "the folder of a trained one"
)


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


class ModelSettings(Settings):
    model: str = setting("The pipeline to measure.", "models/emoji")


class JudgeSettings(Settings):
    judge: str = setting("The CLIP that scores pictures.", "models/judge")


class JudgedSettings(ModelSettings, JudgeSettings):
    """A pipeline, and the judge of what it draws."""


class SeededSettings(DataSettings):
    """The data set, and the seed of everything random."""

    seed: int = setting("Seed of the choices, of the noise and of the first picture.", 0)


class FigureSettings(SeededSettings):
    """The pictures of a measurement, and where its results go."""

    output: str = setting("PNG to write.", "")
    json: str = setting("File for the figures.", "")


class SplitSettings(FigureSettings):
    split: str = setting("Split to take pictures from.", "validation")


class BatchSettings(Settings):
    batch_size: int = setting("Pictures in one pass of the network.", 25, "at least 1")


class CountSettings(SplitSettings):
    num_pictures: int = setting("Pictures drawn at random.", 200, "at least 1")


class StepsSettings(Settings):
    num_inference_steps: int | None = setting(
        "Denoising steps; the model's own by default.", None, "at least 1"
    )


class PassSettings(StepsSettings, BatchSettings):
    """The number of denoising steps, and the number of pictures in one pass."""


class GuidanceSettings(PassSettings):
    """How the model draws."""

    guidance_scale: float | None = setting(
        "Classifier-free guidance; the model's own by default.", None, "0 or more"
    )
    clip_guidance_scale: float | None = setting(
        "Guidance by the noised CLIP, 0 for none; the model's own unless guidance_scale is given.",
        None,
        "0 or more",
    )

    def drawing(self) -> dict[str, Any]:
        """These settings as keyword arguments of `samples.draw`."""
        names = ("num_inference_steps", "guidance_scale", "clip_guidance_scale", "batch_size")
        return {name: getattr(self, name) for name in names}


class ClassifierSettings(Settings):
    noisy_classifier: str = setting("Folder of a NoisyClassifier; " + OWN, "", TRAINED)


class GuidesSettings(ClassifierSettings):
    noisy_clip: str = setting("Folder of a NoisyCLIP; " + OWN, "", TRAINED)


class EvaluationConfig(JudgedSettings, GuidanceSettings, CountSettings, WordSettings):
    """Settings of `training.evaluate` zero-shot, retrieval, sheet and words."""

    clip: str = setting(
        "zero-shot: CLIP to measure, default judge; words: CLIP or pipeline, default model.", ""
    )
    split: str = setting("Split to use; by default the command's own choice.", "")
    num_inference_steps: int = 25
    eta: float | None = setting("Share of DDPM's noise, 0 .. 1; the scheduler's own by default.", None)
    teacher: bool = setting("words: the teacher's figures too.", False)
