"""Inpainting against StableDiffusionInpaintPipeline, and what is promised of the pixels that are kept."""

import copy
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFilter

from pipelines import DDPMScheduler, ImageToImagePipeline, InpaintPipeline, TextToImagePipeline, editing
from pipelines.drawing.images import MAX_PIXELS, encode_pictures, to_tensor
from pipelines.drawing.masks import (
    crop_region,
    extend_canvas,
    grow_to_fill,
    outpainting_windows,
    renoise,
    repaint_order,
    shrink_to_fit,
)

PROMPT = "a corgi in a party hat"
KINDS = ["merged", "trained"]  # U-Nets of 4 and of 9 channels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def disc(width: int = 32, height: int = 32, box=(9, 6, 25, 21), soft: float = 0) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask.filter(ImageFilter.GaussianBlur(soft)) if soft else mask


def marked(mask: Image.Image, least: int = 1) -> np.ndarray:
    return np.asarray(mask) >= least


@pytest.fixture(scope="session")
def inpainting_folders(stable_diffusion_folder, make_unet, tmp_path_factory):
    """kind -> a tiny Stable Diffusion saved by diffusers, the second with the 9 channels for inpainting."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(stable_diffusion_folder)
    unet = make_unet(UNet2DConditionModel, in_channels=9, out_channels=4)
    trained = StableDiffusionInpaintPipeline(
        **(pipe.components | {"unet": unet}), requires_safety_checker=False
    )
    folder = tmp_path_factory.mktemp("inpainting")
    trained.save_pretrained(folder)
    return {"merged": stable_diffusion_folder, "trained": folder}


def load(cls, folder):
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def loaded_pairs(inpainting_folders):
    classes = (StableDiffusionInpaintPipeline, InpaintPipeline)
    pairs = {kind: [load(cls, folder) for cls in classes] for kind, folder in inpainting_folders.items()}
    return {kind: (pair, [pipe.scheduler for pipe in pair]) for kind, pair in pairs.items()}


@pytest.fixture
def load_both(loaded_pairs):
    """load_both(kind) -> (theirs, ours), as loaded from one folder, with schedulers of their own."""

    def take(kind):
        pair, schedulers = loaded_pairs[kind]
        for pipe, scheduler in zip(pair, schedulers, strict=True):
            pipe.scheduler = copy.deepcopy(scheduler)
        return pair

    return take


@pytest.fixture
def make_inpaint(make_pipeline, make_unet):
    """make_inpaint(kind, **parts): in pixels, with a U-Net of 3 or of 7 channels."""

    def make(kind="merged", **parts):
        if kind == "trained":
            parts.setdefault("unet", make_unet(in_channels=7, out_channels=3))
        pipe = InpaintPipeline.from_pipe(make_pipeline(**parts))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


# ---------------------------------------------------------------- Stable Diffusion


CALLS = [
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"strength": 0.5, "guidance_scale": 1.0}),
    ("DDIMScheduler", {"eta": 0.6, "strength": 0.7, "num_images_per_prompt": 2}),
    ("DDPMScheduler", {"prompt": [PROMPT, "a cat"], "image": [picture(seed=1), picture(seed=2)]}),
    ("DDPMScheduler", {"strength": 0.75, "negative_prompt": "blue", "mask_image": disc(soft=2)}),
    ("DDPMScheduler", {"timesteps": [900, 500, 100, 3], "latents": torch.randn(1, 4, 16, 16)}),
    (
        "DPMSolverMultistepScheduler",
        {"image": picture(64, 48), "mask_image": disc(40, 40), "height": 24, "width": 40},
    ),
    ("EulerDiscreteScheduler", {"strength": 0.6}),
    ("EulerAncestralDiscreteScheduler", {"generator": [1]}),
    ("HeunDiscreteScheduler", {}),
    (
        "UniPCMultistepScheduler",
        {"image": torch.rand(1, 3, 32, 32), "mask_image": (torch.rand(1, 32, 32) > 0.5).float()},
    ),
    ("LCMScheduler", {"strength": 0.8}),
]  # fmt: skip


def draw(pipe, scheduler, arguments, **options):
    settings = {"prompt": PROMPT, "image": picture(), "mask_image": disc(), "num_inference_steps": 6}
    settings |= {"guidance_scale": 7.5, "generator": 0, "height": 32, "width": 32} | arguments
    seeds = settings.pop("generator")
    settings["generator"] = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
    if "timesteps" in settings:
        del settings["num_inference_steps"]
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe(**settings, **options).images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, arguments", CALLS, ids=lambda value: value if isinstance(value, str) else str(list(value))
)
def test_latents_equal_stable_diffusions(load_both, kind, name, arguments):
    latents = [draw(pipe, name, arguments, output_type="latent") for pipe in load_both(kind)]
    difference = (latents[0] - latents[1]).abs().max()
    print(f"{kind} {name}: {difference:.1e}")
    assert latents[0].shape == latents[1].shape and latents[0].std() > 0.3
    assert difference < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_repainted_pixels_equal_stable_diffusions(load_both, kind):
    """Where the mask is 0, diffusers decodes the picture's latents, which loses detail."""
    theirs, ours = (draw(pipe, "DDPMScheduler", {}, output_type="np") for pipe in load_both(kind))
    repainted = marked(disc(), 255)
    assert np.abs(theirs - ours)[:, repainted].max() < 1e-4 and theirs.std() > 0.05
    assert np.abs(theirs - ours)[:, ~repainted].max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding, soft, size", [(0, 0, (90, 70)), (7, 3, (90, 70)), (30, 0, (100, 33))])
def test_a_cropped_region_equals_stable_diffusions(load_both, kind, padding, soft, size):
    whole, mask = picture(*size), disc(*size, box=(60, 10, 78, 26), soft=soft)
    call = {"image": whole, "mask_image": mask, "padding_mask_crop": padding}
    theirs, ours = (np.asarray(draw(pipe, "DDIMScheduler", call)[0], dtype=int) for pipe in load_both(kind))
    assert theirs.shape == ours.shape == (size[1], size[0], 3)
    assert np.abs(theirs - ours).max() <= 1  # rounding of half levels
    assert (ours != np.asarray(whole)).any(-1)[marked(mask, 200)].mean() > 0.9
    assert np.array_equal(ours[~marked(mask)], np.asarray(whole)[~marked(mask)])


def test_callbacks_see_and_replace_the_mask(load_both):
    """With the mask all zero from the first step on, the latents end as the picture's own."""
    _, ours = load_both("merged")
    own = ImageToImagePipeline.from_pipe(ours)
    latents = encode_pictures(own.vae, to_tensor(picture()), seeded())

    def keep_all(pipe, i, t, tensors):
        assert tensors["mask"].shape == (1, 1, 16, 16) and tensors["masked_image_latents"].shape == (
            1,
            4,
            16,
            16,
        )
        return {"mask": torch.zeros_like(tensors["mask"])}

    options = {
        "callback_on_step_end": keep_all,
        "callback_on_step_end_tensor_inputs": ["mask", "masked_image_latents"],
    }
    drawn = draw(ours, "DDIMScheduler", {}, output_type="latent", **options)
    torch.testing.assert_close(drawn, latents)


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [
    {}, {"strength": 0.6}, {"padding_mask_crop": 4}, {"num_images_per_prompt": 2},
    {"width": 32, "height": 32}, {"jump_length": 1, "jump_n_sample": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (32, 32)])
def test_kept_pixels_are_bit_exact_in_pixels(make_inpaint, kind, call, size):
    if kind == "trained":  # resampling is refused for those, see below
        call = {name: value for name, value in call.items() if not name.startswith("jump")}
    pipe = make_inpaint(kind)
    whole, mask = picture(*size), disc(*size, box=(4, 4, 12, 12))
    images = pipe(PROMPT, image=whole, mask_image=mask, generator=seeded(), **call).images
    if "width" in call:
        whole = whole.resize((32, 32), Image.Resampling.LANCZOS)
        mask = mask.resize((32, 32), Image.Resampling.BILINEAR)
    for image in images:
        assert image.size == whole.size and image.mode == "RGB"
        same = np.asarray(image) == np.asarray(whole)
        assert same[~marked(mask)].all()
        assert same.all(-1)[marked(mask, 255)].mean() < 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [{}, {"strength": 0.5}, {"padding_mask_crop": 8}], ids=str)
def test_kept_pixels_are_bit_exact_through_a_vae(load_both, kind, call):
    _, ours = load_both(kind)
    whole, mask = picture(64, 48), disc(64, 48, box=(11, 9, 30, 31))
    (image,) = ours(PROMPT, image=whole, mask_image=mask, num_inference_steps=3, **call).images
    same = np.asarray(image) == np.asarray(whole)
    assert same[~marked(mask)].all() and not same.all(-1)[marked(mask, 255)].all()


def test_kept_pixels_are_bit_exact_in_half_precision(make_inpaint):
    shared = make_inpaint(scheduler=diffusers.DDIMScheduler())
    pipe = copy.deepcopy(shared).to(torch.bfloat16)
    whole, mask = picture(16, 16), disc(16, 16, box=(4, 4, 12, 12))
    (image,) = pipe(PROMPT, image=whole, mask_image=mask).images
    assert (np.asarray(image) == np.asarray(whole))[~marked(mask)].all()


def test_soft_masks_blend(make_inpaint):
    """Where the mask is between 0 and 1: that share of what a hard mask of the same outline draws."""
    pipe, whole = make_inpaint(), picture(16, 16)
    soft = disc(16, 16, box=(3, 3, 12, 12), soft=2)
    hard = soft.point(lambda level: 255 * (level >= 128))
    call = {"image": whole, "output_type": "pt"}
    blended = pipe(PROMPT, mask_image=soft, generator=seeded(), **call).images
    drawn = pipe(PROMPT, mask_image=hard, generator=seeded(), **call).images
    share = torch.from_numpy(np.array(soft) / 255).float()
    kept = torch.from_numpy(np.array(whole) / 255).float().permute(2, 0, 1)[None]
    inside = share >= 0.5
    expected = share * drawn + (1 - share) * kept
    assert ((share > 0) & (share < 1)).sum() > 40
    torch.testing.assert_close(blended[..., inside], expected[..., inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(blended[..., ~inside], kept[..., ~inside], atol=1e-5, rtol=0)


def test_a_full_mask_is_text_to_image(make_pipeline, make_inpaint):
    expected = make_pipeline()([PROMPT, "a cat"], generator=seeded(), output_type="latent").images
    call = {"image": picture(16, 16), "mask_image": Image.new("1", (16, 16), 1), "generator": seeded()}
    drawn = make_inpaint()([PROMPT, "a cat"], **call, output_type="latent").images
    assert torch.equal(drawn, expected)


def test_a_picture_depends_on_its_own_seed_alone(make_inpaint, load_both):
    for pipe, size in ((make_inpaint(), 16), (load_both("merged")[1], 32)):
        call = {
            "image": picture(size, size),
            "mask_image": disc(size, size, (4, 4, 12, 12)),
            "output_type": "pt",
        }
        together = pipe(
            PROMPT, num_images_per_prompt=3, generator=[seeded(i) for i in range(3)], **call
        ).images
        alone = [pipe(PROMPT, generator=[seeded(i)], **call).images for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
        assert (together[0] - together[1]).abs().max() > 1e-2


def test_a_trained_model_sees_the_mask_and_what_it_leaves(make_inpaint, make_unet):
    """Channels are [x_t, mask, masked picture], the masked part grey."""
    unet = make_unet(in_channels=7, out_channels=3)
    pipe, seen = make_inpaint("trained", unet=unet), []
    pipe.unet.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    whole, mask = picture(16, 16), disc(16, 16, box=(4, 4, 12, 12))
    pipe(PROMPT, image=whole, mask_image=mask, num_inference_steps=2)
    hole = torch.from_numpy(np.array(mask) > 127).float()
    for sample in seen:
        assert sample.shape == (2, 7, 16, 16) and torch.equal(sample[0], sample[1])
        torch.testing.assert_close(sample[0, 3], hole)
        torch.testing.assert_close(sample[0, 4:], to_tensor(whole)[0] * (1 - hole))


@pytest.mark.parametrize("kind", KINDS)
def test_self_conditioned_models_inpaint(make_inpaint, make_unet, kind):
    """The estimate of x0 has C channels; a model of 2C + 1 reads zeros in the place of the others."""
    channels = 7 if kind == "trained" else 3
    pipe = make_inpaint(kind, unet=make_unet(in_channels=channels, out_channels=3, self_conditioning=True))
    seen = []
    join = pipe.unet.join_input
    pipe.unet.join_input = lambda sample, added: seen.append(added["x0_self"]) or join(sample, added)
    call = {"image": picture(16, 16), "mask_image": disc(16, 16, (4, 4, 12, 12)), "output_type": "latent"}
    pipe(PROMPT, guidance_scale=1.0, num_inference_steps=3, **call)
    assert all(x0.shape == (1, channels, 16, 16) for x0 in seen) and seen[0].abs().max() == 0
    assert seen[1][:, :3].abs().max() > 0 and (seen[1][:, 3:] == 0).all()


# ---------------------------------------------------------------- RePaint


def test_resampling_goes_through_repaints_own_timesteps():
    for steps, length, count in ((10, 2, 3), (25, 10, 10), (12, 5, 2), (7, 1, 2), (4, 10, 3)):
        scheduler = RePaintScheduler(num_train_timesteps=steps)
        scheduler.set_timesteps(steps, length, count)
        theirs = scheduler.timesteps.tolist()
        # theirs lists each step back too, as a timestep that is higher than the one before
        denoised = [t for t, before in zip(theirs, [steps, *theirs], strict=False) if t < before]
        assert [steps - 1 - k for k in repaint_order(steps, length, count)] == denoised
    assert repaint_order(5, 3, 1) == [0, 1, 2, 3, 4]


def test_going_back_restores_the_noise_level():
    """q(x_t | x_s) after q(x_s | x0) is q(x_t | x0): mean and variance, over many draws."""
    generator, x0 = seeded(), torch.full((200_000,), 0.7, dtype=torch.float64)
    z = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    abar_s, abar_t = 0.8, 0.3
    x_s = abar_s**0.5 * x0 + (1 - abar_s) ** 0.5 * z[0]
    x_t = renoise(x_s, z[1], abar_s, abar_t)
    assert abs(x_t.mean() - abar_t**0.5 * 0.7) < 5 * (0.7 / 200_000) ** 0.5
    assert abs(x_t.var() - (1 - abar_t)) < 5 * 0.7 * (2 / 200_000) ** 0.5


def test_resampling_equals_repaint_by_hand(make_inpaint):
    """RePaint, algorithm 1, written out with diffusers' DDPMScheduler."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    pipe = make_inpaint(scheduler=DDPMScheduler(**settings))
    whole, mask = to_tensor(picture(16, 16)), disc(16, 16, box=(4, 4, 12, 12))
    call = {"num_inference_steps": 6, "jump_length": 2, "jump_n_sample": 2, "guidance_scale": 1.0}
    drawn = pipe(
        PROMPT, image=picture(16, 16), mask_image=mask, generator=seeded(), output_type="latent", **call
    )

    chain = diffusers.DDPMScheduler(**settings)
    chain.set_timesteps(6)
    states, pooled = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    hole = torch.from_numpy(np.array(mask) > 127).float()
    generator = seeded()
    x = torch.randn(1, 3, 16, 16, generator=generator)
    draw_noise = lambda: torch.randn(1, 3, 16, 16, generator=generator)  # noqa: E731
    visited = chain.timesteps.tolist()
    abar = [chain.alphas_cumprod[t].item() for t in visited] + [1.0]
    moves = [0, 1, 2, 3, (-2, 2), 2, 3, 4, 5, (-2, 4), 4, 5]
    with torch.no_grad():
        for move in moves:
            if isinstance(move, tuple):
                ratio = abar[move[1]] / abar[move[1] + 2]
                x = ratio**0.5 * x + (1 - ratio) ** 0.5 * draw_noise()
                continue
            eps = pipe.unet(x, visited[move], states).sample
            x = chain.step(eps, visited[move], x, generator=generator).prev_sample
            known = abar[move + 1] ** 0.5 * whole + (1 - abar[move + 1]) ** 0.5 * draw_noise()
            x = hole * x + (1 - hole) * known
    torch.testing.assert_close(drawn.images, x, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- geometry


def test_crop_regions_are_diffusers():
    processor, random = VaeImageProcessor(), np.random.default_rng(0)
    for _ in range(300):
        width, height = random.integers(8, 120, 2).tolist()
        xs, ys = np.sort(random.integers(0, width, 2)), np.sort(random.integers(0, height, 2))
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).rectangle([xs[0], ys[0], xs[1], ys[1]], fill=200)
        target = random.integers(1, 9, 2).tolist()
        pad = int(random.integers(0, 30))
        assert crop_region(mask, *target, pad) == processor.get_crop_region(mask, *target, pad)


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (33, 32), (64, 64), (7, 90)])
def test_fitting_in_and_filling_are_diffusers(size):
    image, processor = picture(*size), VaeImageProcessor()
    inside = np.asarray(shrink_to_fit(image, 32, 32), dtype=int)
    expected = np.asarray(processor._resize_and_fill(image, 32, 32), dtype=int)
    differ = np.abs(inside - expected).max(axis=(1, 2)), np.abs(inside - expected).max(axis=(0, 2))
    # diffusers leaves the last line black where the border is of an odd width
    assert differ[0][:-1].max() <= 1 and differ[1][:-1].max() <= 1
    filled = np.asarray(grow_to_fill(image, 32, 32))
    assert np.array_equal(filled, np.asarray(processor._resize_and_crop(image, 32, 32)))


@pytest.mark.parametrize(("size", "enlarges"), [((64, 12), True), ((12, 64), True), ((12, 12), False)])
def test_a_region_that_outgrows_the_model_on_one_side_is_enlarged(make_inpaint, monkeypatch, size, enlarges):
    """As the upsampler would: here it makes all of it red."""
    pipe, grown = make_inpaint(), []
    monkeypatch.setattr(editing, "enlarged", lambda *given: grown.append(given[1].size) or red)
    picture, red = Image.new("RGB", size, "blue"), Image.new("RGB", (64, 64), "red")
    mask = Image.new("L", size)
    mask.paste(255, (1, 1, size[0] - 1, size[1] - 1))
    call = {"num_inference_steps": 1}
    drawn = np.asarray(editing.repaint(pipe, "a cat", picture, mask, 0, torch.Generator(), **call))
    assert grown == [pipe.sample_size] * enlarges
    inside, kept = drawn[1:-1, 1:-1], np.asarray(mask) == 0
    assert (inside == (255, 0, 0)).all() == enlarges and (drawn[kept] == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(300, 64), (64, 129), (200, 170), (64, 64), (65, 300)])
@pytest.mark.parametrize("overlap", [1, 32, 48, 63])
def test_windows_cover_the_canvas_from_the_picture_outwards(size, overlap):
    for known in ((0, 0, 64, 64), (1, 0, 40, 30), (0, 0, size[0], 20), (size[0] - 50, size[1] - 64, *size)):
        seen = np.zeros(size[::-1], dtype=bool)
        seen[known[1] : known[3], known[0] : known[2]] = True
        boxes = outpainting_windows(size, known, (64, 64), overlap)
        for left, top, right, bottom in boxes:
            assert right - left == bottom - top == 64
            assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
            window = seen[top:bottom, left:right]
            if not window.all():  # a full window's length of what is there by `overlap`, or all there is
                least = min(overlap, known[2] - known[0], known[3] - known[1])
                assert max(window.any(0).sum(), window.any(1).sum()) >= least
                assert window.any()
            window[:] = True
        assert seen.all()


# ---------------------------------------------------------------- outpainting


@pytest.mark.parametrize(
    "size, sides",
    [
        ((16, 16), {"right": 16}),
        ((16, 16), {"left": 1}),
        ((16, 16), {"left": 5, "top": 20, "right": 3, "bottom": 9}),
        ((10, 7), {"top": 3}),  # smaller than a window, and of sizes that the model does not draw
        ((45, 33), {"bottom": 31, "right": 2}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_outpainting_keeps_the_picture_bit_exact(make_inpaint, kind, size, sides):
    pipe, whole = make_inpaint(kind), picture(*size)
    sides = {"left": 0, "top": 0, "right": 0, "bottom": 0} | sides
    images = pipe.outpaint(PROMPT, whole, **sides, num_inference_steps=2, num_images_per_prompt=2).images
    x, y = sides["left"], sides["top"]
    for image in images:
        assert image.size == (size[0] + x + sides["right"], size[1] + y + sides["bottom"])
        assert np.array_equal(np.asarray(image.crop((x, y, x + size[0], y + size[1]))), np.asarray(whole))
        padding = extend_canvas(whole, x, y, sides["right"], sides["bottom"])
        changed = (np.asarray(image) != np.asarray(padding)).any(-1)
        assert changed.mean() > 0.8 * (1 - whole.width * whole.height / (image.width * image.height))
    assert images[0].tobytes() != images[1].tobytes()


def test_each_window_continues_what_the_last_one_drew(make_inpaint):
    """Window by window, by hand: 16 pixels to the right of 16, 12 shared, are windows at 4, 8, 12, 16."""
    pipe, whole = make_inpaint(), picture(16, 16)
    drawn = pipe.outpaint(PROMPT, whole, right=16, overlap=12, generator=seeded()).images[0]
    canvas, generator = extend_canvas(whole, 0, 0, 16, 0), seeded()
    for left in (4, 8, 12, 16):
        mask = Image.new("1", (16, 16))
        mask.paste(1, (12, 0, 16, 16))
        box = (left, 0, left + 16, 16)
        canvas.paste(
            pipe(PROMPT, image=canvas.crop(box), mask_image=mask, generator=generator).images[0], box
        )
    assert drawn.tobytes() == canvas.tobytes()


# ---------------------------------------------------------------- input of all kinds


def repaint(pipe, image, mask=None, **call):
    mask = disc(16, 16, (4, 4, 12, 12)) if mask is None else mask
    return pipe(
        PROMPT, image=image, mask_image=mask, num_inference_steps=2, generator=seeded(), **call
    ).images


def test_pictures_of_every_mode_are_what_a_person_sees(make_inpaint):
    pipe, plain = make_inpaint(), picture(16, 16)
    kept = ~marked(disc(16, 16, (4, 4, 12, 12)))
    grey = plain.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.new("L", (16, 16)))
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.getexif().update(exif)
    palette = plain.quantize(16)
    for name, image, seen in (
        ("RGBA", plain.convert("RGBA"), plain),
        ("transparent", clear, Image.new("RGB", (16, 16), "white")),
        ("16 bit", deep, grey.convert("RGB")),
        ("CMYK", plain.convert("CMYK"), plain),
        ("EXIF", turned, plain),
        ("palette", palette, palette.convert("RGB")),
        ("1 bit", grey.convert("1"), grey.convert("1").convert("RGB")),
        ("array", np.asarray(plain), plain),
        ("floats", np.asarray(plain) / np.float32(255), plain),
        ("tensor", torch.from_numpy(np.array(plain)).permute(2, 0, 1), plain),
    ):
        (drawn,) = repaint(pipe, image)
        assert np.array_equal(np.asarray(drawn)[kept], np.asarray(seen)[kept]), name


def test_masks_of_every_kind_mark_the_same(make_inpaint):
    pipe, whole, mask = make_inpaint(), picture(16, 16), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    strokes = Image.new("RGBA", (16, 16))
    strokes.paste((255, 255, 255, 255), (4, 4, 12, 12))
    numbers = np.array(mask) / np.float32(255)
    (expected,) = repaint(pipe, whole, mask)
    for name, given in (
        ("1", mask.convert("1")),
        ("RGB", mask.convert("RGB")),
        ("RGBA", strokes),
        ("16 bit", Image.fromarray(np.array(mask).astype(np.uint16) * 257)),
        (
            "half the size",
            mask.resize((4, 4), Image.Resampling.NEAREST).resize((16, 16), Image.Resampling.NEAREST),
        ),
        ("array", numbers),
        ("array of a batch", numbers[None]),
        ("array with a channel", numbers[..., None]),
        ("tensor", torch.from_numpy(numbers)),
        ("tensor with a channel", torch.from_numpy(numbers)[None]),
        ("batch", torch.from_numpy(numbers)[None, None]),
        ("bools", torch.from_numpy(numbers) > 0),
    ):
        (drawn,) = repaint(pipe, whole, given)
        assert drawn.tobytes() == expected.tobytes(), name


def test_a_mask_of_another_size_is_stretched(make_inpaint):
    whole, small = picture(32, 16), Image.new("1", (4, 4))
    small.paste(1, (2, 0, 4, 4))  # the right half
    (drawn,) = repaint(make_inpaint(), whole, small)
    changed = (np.asarray(drawn) != np.asarray(whole)).any(-1)
    assert not changed[:, :12].any() and changed[:, 20:].mean() > 0.9


@pytest.mark.parametrize(
    "image, mask, call, message",
    [
        (picture(16, 16), Image.new("L", (16, 16)), {}, "`mask_image` has nothing to repaint"),
        (picture(16, 16), Image.new("L", (16, 16), 100), {}, "nothing to repaint"),
        (picture(16, 16), Image.new("L", (16, 16)), {"padding_mask_crop": 2}, "black everywhere"),
        (picture(16, 16), disc(16, 16), {"padding_mask_crop": -1}, "`padding_mask_crop` must be pixels"),
        (np.zeros((16, 16, 3)), disc(16, 16), {"padding_mask_crop": 1}, "`image` must be a PIL picture"),
        (picture(16, 16), disc(16, 16), {"padding_mask_crop": 1, "output_type": "pt"}, "must be 'pil'"),
        (picture(16, 16), disc(16, 16), {"strength": 1.5}, r"`strength` must be in 0..1, got 1.5"),
        (picture(16, 16), disc(16, 16), {"strength": 0.1}, "`strength` must be at least 0.5, one of 2"),
        (picture(16, 16), disc(16, 16), {"height": 32}, "`height` and `width` go together"),
        (picture(16, 16), disc(16, 16), {"jump_n_sample": 0}, "`jump_n_sample` must be a whole number"),
        ([picture(16, 16)] * 2, disc(16, 16), {}, "`image` must be one picture, or one for each of 1"),
        ([picture(16, 16), picture(8, 8)], disc(16, 16), {}, "`image` must be pictures of one size"),
        (picture(16, 16), [disc(16, 16)] * 3, {}, "`mask_image` must be one picture"),
        (None, disc(16, 16), {}, "`image` must be a PIL picture, an array, a tensor"),
        (picture(16, 16), None, {}, "`mask_image` must be a PIL picture"),
        ("cat.png", disc(16, 16), {}, "got str"),
        (np.full((16, 16, 3), 128.0), disc(16, 16), {}, r"numbers in \[0, 1\] \(or uint8\), got 128 .. 128"),
        (np.full((16, 16, 3), np.nan), disc(16, 16), {}, r"numbers in \[0, 1\]"),
        (np.zeros((16, 16, 4)), disc(16, 16), {}, "`image` must have 1 or 3 channels, got 4"),
        (picture(16, 16), disc(16, 16), {"latents": torch.zeros(1, 4, 16, 16)}, "`latents` must be a tensor"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_work(make_inpaint, image, mask, call, message):
    pipe = make_inpaint()
    # the default pipeline's U-Net is shared by all tests
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.register_forward_hook(lambda *_: pytest.fail("the U-Net was run"))
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": PROMPT, "image": image, "mask_image": mask, "num_inference_steps": 2} | call))


def test_sizes_that_a_model_does_not_draw_name_the_nearest(make_inpaint, make_unet):
    pipe = make_inpaint(unet=make_unet(patch_size=4))
    with pytest.raises(ValueError, match=r"multiples of 4, got height 19 and width 30.*height=20, width=32"):
        repaint(pipe, picture(30, 19))
    (drawn,) = repaint(pipe, picture(30, 19), height=20, width=32)
    assert drawn.size == (32, 20)
    with pytest.raises(ValueError, match=r"nearest are height=4, width=16"):
        repaint(pipe, picture(16, 16), height=1, width=15)


@pytest.mark.parametrize("argument", ["image", "mask_image"])
def test_too_many_pixels_are_refused_by_their_number(make_inpaint, argument):
    huge = Image.new("1", (10_000, 10_000))
    given = {"image": picture(16, 16), "mask_image": disc(16, 16)} | {argument: huge}
    with pytest.raises(ValueError, match=rf"`{argument}` has 10000 x 10000 pixels, 100 million; at most 67"):
        make_inpaint()(PROMPT, **given)
    assert 66e6 < MAX_PIXELS < 68e6


def test_resampling_needs_a_scheduler_without_memory(make_inpaint):
    call = {"image": picture(16, 16), "mask_image": disc(16, 16), "jump_n_sample": 2}
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        make_inpaint(scheduler=diffusers.DPMSolverMultistepScheduler())(PROMPT, **call)
    with pytest.raises(ValueError, match="`jump_n_sample` must be 1 for a U-Net made for inpainting"):
        make_inpaint("trained")(PROMPT, **call)


def test_models_of_other_channels_are_refused(make_inpaint, make_unet):
    with pytest.raises(ValueError, match="3 or 7 input channels and 3 or 6 output channels, got 5 and 3"):
        repaint(make_inpaint(unet=make_unet(in_channels=5, out_channels=3)), picture(16, 16))
    with pytest.raises(ValueError, match="no text-to-image model"):
        TextToImagePipeline.from_pipe(make_inpaint("trained"))(PROMPT)


@pytest.mark.parametrize("call, message", [
    ({}, "needs `left`, `top`, `right` or `bottom`"),
    ({"left": -1}, "`left` must be a whole number of pixels"),
    ({"top": 2.5}, "`top` must be a whole number"),
    ({"left": 1, "overlap": 16}, r"`overlap` must be 1..15, less than a window, got 16"),
    ({"left": 1, "output_type": "pt"}, "`output_type` must be 'pil'"),
    ({"right": 10_000_000}, "the grown picture. has 10000016 x 16"),
])  # fmt: skip
def test_outpainting_refuses_what_makes_no_sense(make_inpaint, call, message):
    with pytest.raises(ValueError, match=message):
        make_inpaint().outpaint(PROMPT, picture(16, 16), **call)


# ---------------------------------------------------------------- folders


ELSEWHERE = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
from PIL import Image
assert "pipelines" not in sys.modules
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
call = {call}
call |= dict(generator=torch.Generator().manual_seed(0), output_type="np")
numpy.save({output!r}, pipe({prompt!r}, image=Image.open({image!r}), **call).images)
print(type(pipe).__name__)
"""


@pytest.mark.parametrize("cls", [ImageToImagePipeline, InpaintPipeline])
def test_a_saved_folder_loads_where_this_repository_is_not(make_inpaint, tmp_path, cls):
    pipe = cls.from_pipe(make_inpaint())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", cls.__name__]
    whole, mask = picture(16, 16), disc(16, 16, (4, 4, 12, 12))
    whole.save(tmp_path / "whole.png")
    mask.save(tmp_path / "mask.png")
    inpaints = cls is InpaintPipeline
    call = f"dict(mask_image=Image.open({str(tmp_path / 'mask.png')!r}))" if inpaints else "{}"
    script = ELSEWHERE.format(
        folder=str(tmp_path / "model"), image=str(tmp_path / "whole.png"), output=str(tmp_path / "drawn.npy"),
        call=call, prompt=PROMPT,
    )  # fmt: skip
    environment = {"PATH": "/usr/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == cls.__name__
    masks = {"mask_image": mask} if inpaints else {}
    expected = pipe(PROMPT, image=whole, generator=seeded(), output_type="np", **masks).images
    np.testing.assert_allclose(np.load(tmp_path / "drawn.npy"), expected, atol=1e-5)
    again = cls.from_pretrained(tmp_path / "model")
    assert type(again) is cls and type(again.unet).__name__ == "ConditionalUNet"
