"""Every task has every kind of guidance, candidates and callbacks: each cell of the table is run, and the
table stands in docs/tasks.md."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from pipelines import ImageToImagePipeline, InpaintPipeline
from pipelines.drawing.attention_maps import AttentionMaps
from pipelines.drawing.loop import noise_levels

DOCUMENT = Path("docs/tasks.md")
PROMPT = "a corgi in a party hat"
TASKS = {
    "text to image": "`TextToImagePipeline`",
    "image to image": "`ImageToImagePipeline`",
    "inpainting, merged": "`InpaintPipeline`, any U-Net",
    "inpainting, trained": "`InpaintPipeline`, a U-Net that sees the mask",
    "outpainting": "`InpaintPipeline.outpaint`",
    "upsampling with text": "`SuperResolutionPipeline`, a U-Net that reads text",
    "upsampling": "`SuperResolutionPipeline`, convolutions alone",
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(side: int) -> Image.Image:
    pixels = torch.rand(side, side, 3, generator=seeded(9)).mul(255).byte().numpy()
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def draw_with(guides, make_unet, make_upsampler, tokenizer, make_text_encoder):
    """task -> (pipeline, f(**call) -> pictures (B, 3, H, W) in [0, 1])."""
    from pipelines import DDPMScheduler, TextToImagePipeline

    text = {"tokenizer": tokenizer, "text_encoder": make_text_encoder()}
    settings = {"default_guidance_scale": 3.0, "default_num_inference_steps": 5}
    # no clipping: random weights would have every pixel at an end, where nothing makes a difference
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        clip_sample=False,
        prediction_type="sample",
    )
    parts = {**text, **guides, "scheduler": scheduler, **settings}
    reads = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "patch_size": 1,
    }
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 8, 16))
    own, small = picture(16), picture(4)
    masked = {"image": own, "mask_image": half}
    pipes = {
        "text to image": (TextToImagePipeline(unet=make_unet(), **parts), {}),
        "image to image": (ImageToImagePipeline(unet=make_unet(), **parts), {"image": own}),
        "inpainting, merged": (InpaintPipeline(unet=make_unet(), **parts), masked),
        "inpainting, trained": (InpaintPipeline(unet=make_unet(in_channels=7), **parts), masked),
        "outpainting": (InpaintPipeline(unet=make_unet(), **parts), {"image": own, "right": 6}),
        "upsampling with text": (make_upsampler(reads, **text, **guides, default_num_inference_steps=5),
                                 {"image": small}),
        "upsampling": (make_upsampler(**guides, default_num_inference_steps=5), {"image": small}),
    }  # fmt: skip

    def bind(task):
        pipe, given = pipes[task]
        pipe.set_progress_bar_config(disable=True)

        def draw(**call: Any) -> torch.Tensor:
            call = {"generator": seeded(), "guidance_scale": 3.0, "output_type": "pt"} | given | call
            if task == "outpainting":
                call.pop("output_type")
                images = pipe.outpaint(call.pop("prompt", PROMPT), **call).images
                from pipelines.drawing.images import to_tensor

                return to_tensor(images) / 2 + 0.5
            return pipe(call.pop("prompt", PROMPT), **call).images

        return pipe, draw

    return bind


def differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and (a - b).abs().max() > 1e-3


def guided_by(**call):
    """Guidance that is on draws another picture, and outside its interval the same as none."""

    def check(pipe, draw, task):
        none = draw(guidance_scale=1.0)
        differ(draw(guidance_scale=1.0, **call), none)
        assert torch.equal(draw(guidance_scale=1.0, guidance_interval=(1e8, 1e9), **call), none)

    return check


def classifier_free(pipe, draw, task):
    differ(draw(), draw(guidance_scale=1.0))
    assert pipe.guidance_scale == 1.0 and pipe.clip_guidance_scale == 0.0


def negative(pipe, draw, task):
    differ(draw(negative_prompt="a blue book"), draw())


def weighted(pipe, draw, task):
    differ(draw(prompt="a (corgi:1.9) in a party hat"), draw())
    torch.testing.assert_close(draw(prompt="a (corgi:1.0) in a party hat"), draw(), atol=1e-4, rtol=0)


def combined(pipe, draw, task):
    differ(draw(combined_prompts={"a blue book": 1.5}), draw())
    torch.testing.assert_close(draw(combined_prompts={"a blue book": 0.0}), draw(), atol=1e-4, rtol=0)


def rescaled(pipe, draw, task):
    differ(draw(guidance_rescale=0.9), draw())


def interval(pipe, draw, task):
    assert torch.equal(draw(guidance_interval=(1e8, 1e9)), draw(guidance_scale=1.0))
    differ(draw(guidance_interval=(0.5, 1e9)), draw())


def best(pipe, draw, task):
    """One of the two candidates, as each is drawn alone by its own generator."""
    options = {"num_candidates": 2}
    call = {"generator": [seeded(1), seeded(2)]}
    kept = draw(**options, **call)
    alone = [draw(generator=[seeded(seed)]) for seed in (1, 2)]
    assert any(torch.allclose(kept, one, atol=1e-5) for one in alone)
    differ(*alone)


def callback(pipe, draw, task):
    """What it returns takes the place of the latents: a grey picture, where all of it is drawn."""
    seen = []

    def grey(pipe, i, t, tensors):
        seen.append(i)
        return {"latents": torch.zeros_like(tensors["latents"])}

    image = draw(callback_on_step_end=grey, callback_on_step_end_tensor_inputs=["latents"])
    drawn = {"outpainting": image[..., 16:]}.get(task, image)
    drawn = image[..., :8] if "inpainting" in task else drawn
    assert seen == list(range(pipe.num_timesteps)) and (drawn - 0.5).abs().max() < 0.01


def dropping(pipe, draw, task):
    """Guidance that diffusers' callback drops after two of five steps: the picture of the interval above."""
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    dropped = draw(callback_on_step_end=cut)
    levels = noise_levels(pipe.scheduler, pipe.scheduler.timesteps)[-pipe.num_timesteps :]
    torch.testing.assert_close(dropped, draw(guidance_interval=(levels[2], 1e9)), atol=1e-5, rtol=0)
    differ(dropped, draw())


def interrupted(pipe, draw, task):
    steps = []

    def stop(pipe, i, t, tensors):
        steps.append(i)
        pipe._interrupt = i == 1
        return {}

    draw(callback_on_step_end=stop)
    assert steps == [0, 1]


def attended(pipe, draw, task):
    """Each step's map of a word, its shares between 0 and 1."""
    with AttentionMaps(pipe, PROMPT, ["corgi", "hat"]) as maps:
        draw(callback_on_step_end=maps)
    assert len(maps.steps) == pipe.num_timesteps and 0 < maps["corgi"].min() and maps["corgi"].max() < 1
    differ(maps["corgi"], maps["hat"])


CLEAN = {"clip_guidance_scale": 60.0, "clip_guidance": "clean", "clip_guidance_cut_outs": 2}
NO_TEXT = "no text"  # of a U-Net that reads none
FEATURES = {
    "classifier-free guidance": classifier_free,
    "negative prompt": negative,
    "guidance rescale": rescaled,
    "guidance interval": interval,
    "weighted words, `(red:1.3)`": weighted,
    "combined prompts": combined,
    "CLIP guidance, noised": guided_by(clip_guidance_scale=60.0),
    "CLIP guidance, clean": guided_by(
        clip_guidance_scale=60.0, clip_guidance="clean", clip_guidance_cut_outs=2
    ),
    "classifier guidance": guided_by(classifier_guidance_scale=60.0, class_labels="food"),
    "best of several candidates": best,
    "callbacks replace latents": callback,
    "callbacks drop guidance midway": dropping,
    "interrupt": interrupted,
    "attention maps of words": attended,
}
TEXTUAL = list(FEATURES)[:6] + ["callbacks drop guidance midway", "attention maps of words"]
# cells without a meaning, and what they say
SAYS = {("upsampling", feature): NO_TEXT for feature in TEXTUAL}
SAYS |= {
    ("upsampling", "CLIP guidance, noised"): NO_TEXT,
    ("upsampling", "best of several candidates"): "yes, by a clean CLIP",
}
SAYS |= {
    ("outpainting", "callbacks replace latents"): "yes, in each window",
    ("outpainting", "interrupt"): "yes, in each window",
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_task_has_each_feature(draw_with, task, feature):
    pipe, draw = draw_with(task)
    if SAYS.get((task, feature)) == NO_TEXT:
        if feature == "combined prompts":
            with pytest.raises(ValueError, match="combined_prompts"):
                draw(combined_prompts={"a blue book": 1.0})
        elif "CLIP" in feature:
            with pytest.raises(ValueError, match="clip_guidance_scale"):
                draw(clip_guidance_scale=60.0, prompt=None)
        elif "attention" in feature:
            with pytest.raises(ValueError, match="text"), AttentionMaps(pipe, PROMPT, ["hat"]):
                pass
        else:  # the prompt, and what is said about it, is not looked at
            assert torch.equal(draw(negative_prompt="x", prompt="y", guidance_rescale=0.5), draw())
        return
    FEATURES[feature](pipe, draw, task)


def table() -> str:
    lines = ["| | " + " | ".join(TASKS) + " |", "| --- |" + " --- |" * len(TASKS)]
    for feature in FEATURES:
        cells = [SAYS.get((task, feature), "yes") for task in TASKS]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_stands_in_the_document():
    if os.environ.get("WRITE_TABLES"):
        head, _, rest = DOCUMENT.read_text().partition("| | ")
        tail = rest.partition("\n\n")[2]
        DOCUMENT.write_text(f"{head}{table()}\n\n{tail}")
    assert table() in DOCUMENT.read_text(), "WRITE_TABLES=1 writes it"
