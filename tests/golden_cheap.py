"""The cheap part of the golden record: every kind of call, on tiny models."""

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers import DDPMScheduler as DiffusersDDPM
from golden import Record, Section
from golden_models import (
    PROMPT,
    SMALL,
    chain,
    disc,
    filled,
    latent_pipeline,
    noisy_classifier,
    noisy_clip,
    picture,
    pixel_pipeline,
    quiet,
    seeded,
    text_encoder,
    text_settings,
    tokenizer,
    unet,
    upsampler,
    vae,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
)

from pipelines import (
    DDPMScheduler,
    ImageToImagePipeline,
    InpaintPipeline,
    TextToImagePipeline,
)


def draw(record: Record, name: str, pipe: Any, **call: Any) -> None:
    """Records a call with seed 0, as float32 pixels unless `output_type` says otherwise, or its error."""
    try:
        images = pipe(**({"prompt": PROMPT, "generator": seeded(), "output_type": "np"} | call)).images
    except Exception as error:
        record.failed(name, error)
    else:
        record.pictures(name, images)


def run_module(name: str, *arguments: object) -> str:
    """`python -m NAME ARGUMENTS` in this process; what it printed."""
    argv, printed = sys.argv, io.StringIO()
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise
    finally:
        sys.argv = argv
        torch.set_num_threads(1)
    return printed.getvalue()


def coding_module() -> str:
    """`pipelines.progressive_coding`: the command, wherever it is in this checkout."""
    file = min(Path("pipelines").rglob("progressive_coding.py"), key=lambda path: len(path.parts))
    return ".".join(file.with_suffix("").parts)


# ------------------------------------------------------------ text to image


def guidance(record: Record) -> None:
    pipe = pixel_pipeline(noisy_clip=noisy_clip(), noisy_classifier=noisy_classifier())
    by_class = {"classifier_guidance_scale": 60.0, "class_labels": "food"}
    calls: dict[str, dict[str, Any]] = {
        "unguided": {"guidance_scale": 1.0},
        "classifier-free": {},
        "rescaled": {"guidance_rescale": 0.7},
        "interval": {"guidance_interval": (0.3, 3.0)},
        "negative prompt": {"negative_prompt": "blue"},
        "weighted words": {"prompt": "a corgi in a (red:1.3) [hat]", "negative_prompt": "(blue:0.5) sky"},
        "combined prompts": {"combined_prompts": {"in the snow": 0.6, "blue": -0.3}},
        "combined, rescaled, interval": {
            "combined_prompts": {"snow": 0.6}, "guidance_rescale": 0.5, "guidance_interval": (0.0, 2.0)
        },
        "noised CLIP": {"guidance_scale": 3.0, "clip_guidance_scale": 40.0},
        "noised CLIP in an interval": {"clip_guidance_scale": 40.0, "guidance_interval": (0.0, 2.0)},
        "classifier": by_class,
        "classifier alone": {"guidance_scale": 1.0, **by_class, "class_labels": 2},
        "classifier and noised CLIP": {"clip_guidance_scale": 40.0, **by_class},
        "candidates": {"num_candidates": 3},
        "candidates, class and CLIP": {
            "num_candidates": 2, "num_images_per_prompt": 2, "clip_guidance_scale": 9.0, **by_class,
            "generator": [seeded(i) for i in range(4)],
        },
        "classes of two prompts": {
            "prompt": ["a cat", "a pizza"], "num_images_per_prompt": 2, "classifier_guidance_scale": 30.0,
            "class_labels": ["animals", "food"], "negative_prompt": ["a dog", "a soup"],
        },
    }  # fmt: skip
    for name, call in calls.items():
        draw(record, name, pipe, **call)
    own = pixel_pipeline(noisy_clip=noisy_clip(), default_clip_guidance_scale=25.0)
    draw(record, "the folder's own CLIP guidance", own)
    mild = by_class | {"classifier_guidance_scale": 3.0, "clip_guidance_scale": 3.0}
    for cls in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = chain(cls, beta_schedule="linear")
        draw(record, f"all with {cls.__name__}", pipe, **mild)


def clean_clip(record: Record) -> None:
    """CLIP guidance through the predicted x0, by a CLIP of transformers'."""
    config = CLIPConfig(
        text_config=text_settings(),
        vision_config=SMALL | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    filled(CLIPModel(config), 7).save_pretrained(record.folder)
    tokenizer().save_pretrained(record.folder)
    pipe = pixel_pipeline(clip_guidance_model=str(record.folder), noisy_clip=noisy_clip())
    clean = {"clip_guidance_scale": 30.0, "clip_guidance": "clean", "clip_guidance_cut_outs": 3}
    draw(record, "through x0", pipe, **clean)
    draw(record, "through the U-Net", pipe, **clean, clip_guidance_through_unet=True)
    draw(record, "candidates", pipe, num_candidates=2)
    latents = latent_pipeline(clip_guidance_model=pipe.clip_guidance_model)
    draw(record, "through the VAE", latents, **clean)


def calls(record: Record) -> None:
    """What a call may bring besides guidance."""
    pipe = pixel_pipeline()
    two = {"prompt": ["a cat", "a red dog"], "num_images_per_prompt": 2}
    draw(record, "one generator", pipe, **two)
    draw(record, "a list of generators", pipe, **two, generator=[seeded(i) for i in range(4)])
    draw(record, "height and width", pipe, height=24, width=12)
    draw(record, "latents", pipe, latents=torch.randn(1, 3, 16, 16, generator=seeded(9)))
    draw(record, "timesteps", pipe, timesteps=[950, 600, 201, 3])
    draw(record, "clip_skip", pipe, clip_skip=1)
    states, negative = pipe.encode_prompt(PROMPT, negative_prompt="blue")
    record.array("encode_prompt", torch.cat([states, negative]))
    ready = {"prompt": None, "prompt_embeds": states, "negative_prompt_embeds": negative}
    draw(record, "prompt_embeds", pipe, **ready)
    for kind in ("pil", "pt", "latent"):
        draw(record, f"output_type {kind}", pipe, output_type=kind)
    images, flagged = pipe(PROMPT, generator=seeded(), return_dict=False)
    record.pictures("a tuple", images)
    assert flagged is None
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        record.array(f"callback at {i}", tensors["latents"])
        changed = {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if i == 1 else {}
        pipe._interrupt = i == 3
        return changed | {"latents": tensors["latents"] * 0.9}

    draw(
        record, "callback", pipe, num_inference_steps=6,
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    pipe.upsampler = upsampler()
    draw(record, "two stages", pipe, height=64, width=64)
    several = {"num_images_per_prompt": 2, "generator": [seeded(1), seeded(2)]}
    draw(record, "two stages, two pictures", pipe, height=64, width=96, **several)


def schedulers(record: Record) -> None:
    pipe = pixel_pipeline()
    for cls, changes in (
        (DDPMScheduler, {"prediction_type": "epsilon"}),
        (DDPMScheduler, {"prediction_type": "sample", "eta": 0.0}),
        (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "leading"}),
        (DDPMScheduler, {"thresholding": True, "eta": 0.5, "timestep_spacing": "linspace"}),
        (DDPMScheduler, {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
        (DiffusersDDPM, {}),
        (DDIMScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (UniPCMultistepScheduler, {}),
        (EulerDiscreteScheduler, {"beta_schedule": "linear"}),
        (EulerAncestralDiscreteScheduler, {"beta_schedule": "linear"}),
        (HeunDiscreteScheduler, {"beta_schedule": "linear"}),
    ):
        pipe.scheduler = chain(cls, **changes)
        home = "ours" if cls is DDPMScheduler else "diffusers'"
        draw(record, f"{home} {cls.__name__} {changes or ''}".strip(), pipe, num_inference_steps=5)
    pipe.scheduler = chain(DDIMScheduler)
    draw(record, "DDIM eta 0.6", pipe, eta=0.6)
    pipe.scheduler = chain(EulerDiscreteScheduler, beta_schedule="linear")
    draw(record, "Euler sigmas", pipe, sigmas=[14.0, 3.0, 0.5])


def networks(record: Record) -> None:
    """What a U-Net may see and say besides x_t and its prediction."""
    pooled = {"pooled_text_dim": 12, "pooled_text_time_embedding": True, "text_concat_channels": 2}
    for name, config in {
        "self-conditioning": {"self_conditioning": True},
        "patches": {"patch_size": 2, "layers_per_block": 2, "resnet_time_scale_shift": "scale_shift"},
        "pooled text": pooled,
        "pooled text, self-conditioning": pooled | {"self_conditioning": True, "patch_size": 2},
        "guidance as an input": {"time_cond_proj_dim": 8},
    }.items():
        draw(record, name, pixel_pipeline(unet=unet(**config)))
    pipe = pixel_pipeline(unet=unet(self_conditioning=True))
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = chain(cls)
        draw(record, f"self-conditioning with {cls.__name__}", pipe)
    pipe = pixel_pipeline(unet=unet(out_channels=6))
    draw(record, "six channels, fixed variance", pipe)
    for kind in ("learned", "learned_range"):
        pipe.scheduler = chain(variance_type=kind)
        draw(record, kind, pipe)
    guided = pixel_pipeline(unet=unet(out_channels=6), scheduler=pipe.scheduler, noisy_clip=noisy_clip())
    draw(record, "learned_range, noised CLIP", guided, clip_guidance_scale=40.0)


def latents(record: Record) -> None:
    pipe = latent_pipeline()
    draw(record, "guided", pipe, negative_prompt="blue")
    draw(record, "undecoded", pipe, output_type="latent")
    draw(record, "pil, two", pipe, output_type="pil", num_images_per_prompt=2)


# ------------------------------------------------------------ the other tasks


def image_to_image(record: Record) -> None:
    for space, make, size in (("pixels", pixel_pipeline, 16), ("latents", latent_pipeline, 32)):
        pipe, call = make(ImageToImagePipeline), {"image": picture(size, size), "num_inference_steps": 6}
        for strength in (0.35, 0.7, 1.0):
            draw(record, f"{space}, strength {strength}", pipe, **call, strength=strength)
        for cls in (DDIMScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler):
            pipe.scheduler = chain(cls, beta_schedule="linear")
            draw(record, f"{space}, {cls.__name__}", pipe, **call, eta=0.5)
        pipe.scheduler = chain(clip_sample=space == "pixels")
        several = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}
        several["image"] = [picture(size, size, i) for i in (1, 2)]
        draw(record, f"{space}, one generator", pipe, **several)
        draw(record, f"{space}, generators", pipe, **several, generator=[seeded(i) for i in range(4)])
    unit = torch.rand(1, 4, 16, 16, generator=seeded(1))
    draw(record, "given latents", pipe, image=unit, strength=0.6)
    pipe = pixel_pipeline(ImageToImagePipeline, unet=unet(self_conditioning=True))
    options = {"guidance_interval": (0.2, 2.0), "guidance_rescale": 0.4, "negative_prompt": "blue"}
    resized = {"image": picture(30, 20), "height": 16, "width": 24}
    draw(record, "resized, interval, self-conditioning", pipe, **resized, **options)
    draw(record, "timesteps", pipe, image=picture(), timesteps=[900, 700, 500, 300, 99], output_type="latent")


def inpaint(record: Record) -> None:
    seven, nine = {"in_channels": 7, "out_channels": 3}, {"in_channels": 9, "out_channels": 4}
    guessing = unet(**seven, self_conditioning=True)
    for name, pipe, size in (
        ("pixels", pixel_pipeline(InpaintPipeline), 16),
        ("latents", latent_pipeline(InpaintPipeline), 32),
        ("2C + 1 in pixels", pixel_pipeline(InpaintPipeline, unet=unet(**seven)), 16),
        ("2C + 1 in latents", latent_pipeline(InpaintPipeline, unet=unet(**nine)), 32),
        ("2C + 1, self-conditioning", pixel_pipeline(InpaintPipeline, unet=guessing), 16),
    ):
        call = {"image": picture(size, size), "mask_image": disc(size, size), "num_inference_steps": 4}
        draw(record, name, pipe, **call)
        draw(record, f"{name}, strength 0.6", pipe, **call, strength=0.6, output_type="latent")
        draw(record, f"{name}, soft", pipe, **call | {"mask_image": disc(size, size, 2)}, output_type="pil")
        several = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}
        draw(record, f"{name}, generators", pipe, **call, **several, generator=[seeded(i) for i in range(4)])
    pipe = pixel_pipeline(InpaintPipeline)
    call = {"image": picture(), "mask_image": disc(), "num_inference_steps": 4}
    draw(record, "RePaint", pipe, **call, jump_length=2, jump_n_sample=3)
    draw(record, "RePaint, strength 0.8", pipe, **call, jump_length=1, jump_n_sample=2, strength=0.8)
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        pipe.scheduler = chain(cls, beta_schedule="linear")
        draw(record, cls.__name__, pipe, **call, guidance_interval=(0.0, 3.0), guidance_rescale=0.3)
    pipe.scheduler = chain()
    large = {"image": picture(60, 50), "mask_image": disc(60, 50, 1), "output_type": "pil"}
    draw(record, "padding_mask_crop", pipe, **large, padding_mask_crop=3)
    z = torch.randn(1, 3, 16, 16, generator=seeded(9))
    draw(record, "latents given", pipe, **call, latents=z, strength=0.7)

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"mask": 1 - tensors["mask"]} if i == 1 else {}

    names = ["latents", "mask", "masked_image_latents"]
    call |= {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    draw(record, "callback", pipe, **call)


def outpaint(record: Record) -> None:
    pipe = pixel_pipeline(InpaintPipeline)
    sides = {"left": 6, "right": 5, "bottom": 9}
    for name, call in {
        "three sides": {"image": picture(20, 16), **sides},
        "overlap": {"image": picture(20, 16), **sides, "overlap": 4, "negative_prompt": "blue"},
        "a small picture": {"image": picture(6, 8), "top": 4},
        "two pictures": {"image": picture(), "left": 8, "num_images_per_prompt": 2, "jump_n_sample": 2},
    }.items():
        grown = pipe.outpaint(PROMPT, generator=seeded(), num_inference_steps=3, **call).images
        record.pictures(name, grown)


def super_resolution(record: Record) -> None:
    pipe = upsampler()
    call = {"prompt": None, "image": picture(8, 12)}
    draw(record, "pixels", pipe, **call)
    noised = call | {"noise_level": 150, "consistency": 0.4, "num_inference_steps": 3}
    draw(record, "noise level, consistency", pipe, **noised)
    two = call | {"num_images_per_prompt": 2, "noise_level": 30}
    draw(record, "two pictures", pipe, **two)
    draw(record, "generators", pipe, **two, generator=[seeded(1), seeded(2)])
    pipe.scheduler = chain(prediction_type="sample")
    draw(record, "DDPM", pipe, **call, output_type="pil")
    seen: list[float] = []
    draw(record, "callback", pipe, **call, callback=lambda i, t, x: seen.append(float(x.mean())))
    record.numbers("callback's means", seen)
    latent = upsampler(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), scheduler=chain(clip_sample=False),
        unet=unet(8, in_channels=7, out_channels=4, class_embed_type="timestep"),
    )  # fmt: skip
    guided = {"guidance_scale": 3.0, "noise_level": 20, "negative_prompt": "blue"}
    draw(record, "latents", latent, image=picture(8, 12), **guided)
    draw(record, "latents, undecoded", latent, image=picture(8, 8), output_type="latent")


# ------------------------------------------------------------ folders, command lines, coding


def saved(record: Record) -> None:
    """Folders: their files without the code, and pictures from what was loaded again."""
    home = record.folder
    guided = pixel_pipeline(noisy_clip=noisy_clip(), noisy_classifier=noisy_classifier())
    for name, pipe in {"pixels": guided, "latents": latent_pipeline(), "upsampler": upsampler()}.items():
        pipe.save_pretrained(home / name)
        record.tree(name, home / name)
    loaded = quiet(TextToImagePipeline.from_pretrained(home / "pixels"))
    draw(record, "loaded", loaded, clip_guidance_scale=20.0)
    draw(record, "loaded to inpaint", quiet(InpaintPipeline.from_pretrained(home / "latents")),
         image=picture(32, 32), mask_image=disc(32, 32))  # fmt: skip
    pipe = pixel_pipeline()
    pipe.load_guides(home / "pixels")
    draw(record, "load_guides", pipe, classifier_guidance_scale=60.0, class_labels="flags")
    draw(record, "from_pipe", quiet(ImageToImagePipeline.from_pipe(pixel_pipeline())), image=picture())


def command_line(record: Record) -> None:
    home, out = record.folder, record.folder / "out"
    pixel_pipeline().save_pretrained(home / "model")
    upsampler().save_pretrained(home / "model-upsampler")
    noisy_clip().save_pretrained(home / "guides" / "noisy_clip")
    noisy_classifier().save_pretrained(home / "guides" / "noisy_classifier")
    guides = f"--seed 1 --guides {home / 'guides'}"
    for name, options in {
        "two pictures": "--num-images 2 --seed 3 --steps 3 --guidance 2 --negative-prompt blue",
        "dpmpp": "--seed 0 --scheduler dpmpp --steps 4",
        "ddpm": "--seed 0 --scheduler ddpm",
        "large": "--seed 1 --size 64",
        "guided": f"{guides} --clip-guidance 30 --classifier-guidance 40 --class food",
        "best of two": f"{guides} --best-of 2",
    }.items():
        run_module("pipelines", PROMPT, "--model", home / "model", "--out", out / name, *options.split())
        for path in sorted((out / name).glob("*.png")):
            record.png(f"{name}, {path.name}", path)


def coding(record: Record) -> None:
    """A picture as a file and back, progressive and lossless, and the bits that were expected."""
    home, module = record.folder, coding_module()
    network = unet(9, sample_size=8)
    network.conv_out.weight.data *= 0.1  # says next to nothing: x_t is taken for the picture
    schedule = chain(prediction_type="epsilon", variance_type="fixed_large")
    pixel_pipeline(unet=network, scheduler=schedule).save_pretrained(home / "model")
    options = ["--model", home / "model", "--steps", "6"]
    (home / "pictures").mkdir()
    rows = []
    for number in range(2):
        picture(8, 8, number).save(home / "pictures" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"corgi {number}"}))
    (home / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    one, every = home / "one.bin", home / "all.bin"
    cost = run_module(module, "encode", home / "pictures" / "0.png", one, "--caption", PROMPT, *options)
    record.printed("cost, progressive", cost)
    cost = run_module(module, "encode", "--lossless", home / "pictures", every, *options)
    record.printed("cost, lossless", cost)
    record.file("one.bin", one)
    record.file("all.bin", every)
    (home / "begun.bin").write_bytes(one.read_bytes()[: one.stat().st_size - 60])
    run_module(module, "decode", one, home / "one.png", *options[:2])
    run_module(module, "decode", home / "begun.bin", home / "begun.png", "--prefix", *options[:2])
    run_module(module, "decode", every, home / "back", *options[:2])
    record.png("one.png", home / "one.png")
    record.png("begun.png", home / "begun.png")
    for number in range(2):
        record.png(f"back {number}", home / "back" / f"{number:05d}.png")


SECTIONS: list[Callable[[Record], None]] = [
    guidance, clean_clip, calls, schedulers, networks, latents, image_to_image, inpaint, outpaint,
    super_resolution, saved, command_line, coding,
]  # fmt: skip
CHEAP: dict[str, Section] = {section.__name__: section for section in SECTIONS}
