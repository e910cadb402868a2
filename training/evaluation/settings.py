"""The settings that several commands of `training.evaluate` share, in groups to inherit from."""

from training.run.settings import AT_LEAST_1, DataSettings, Settings, setting, settings

OWN = "if empty the model's own, or that of the folder beside it with -guidance added."


@settings
class ModelSettings(Settings):
    model: str = setting("The pipeline to measure.", "models/emoji")


@settings
class JudgeSettings(Settings):
    judge: str = setting("The CLIP that scores pictures.", "models/judge")


@settings
class FigureSettings(DataSettings):
    """What every measurement has: the data set, its seed, and where its results go."""

    seed: int = setting("Seed of the choices, of the noise and of the first picture.", 0)
    output: str = setting("PNG to write.", "")
    json: str = setting("File for the figures.", "")


@settings
class SplitSettings(FigureSettings):
    split: str = setting("Split to take pictures from.", "validation")


@settings
class BatchSettings(Settings):
    batch_size: int = setting("Pictures in one pass of the network.", 25, AT_LEAST_1)


@settings
class CountSettings(Settings):
    num_pictures: int = setting("Pictures drawn at random.", 200, AT_LEAST_1)


@settings
class StepsSettings(Settings):
    num_inference_steps: int | None = setting(
        "Denoising steps; the model's own by default.", None, AT_LEAST_1
    )


@settings
class GuidanceSettings(StepsSettings):
    guidance_scale: float | None = setting("Classifier-free guidance; the model's own by default.", None)
    clip_guidance_scale: float | None = setting(
        "By the noised CLIP, 0 is off; the model's own unless guidance_scale is given.", None
    )


@settings
class NoisyClipSettings(Settings):
    noisy_clip: str = setting("Folder of a NoisyCLIP; " + OWN, "")


@settings
class NoisyClassifierSettings(Settings):
    noisy_classifier: str = setting("Folder of a NoisyClassifier; " + OWN, "")
