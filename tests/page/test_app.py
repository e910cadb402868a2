"""The page's API through gradio's own client, against `python app.py` with a tiny model."""

import json
import re
import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser.served import (
    LABELS,
    SIDE,
    TRAIN_TIMESTEPS,
    Served,
    expected,
    same_picture,
    save_tiny_model,
    serve,
)
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import app
from page import create, edit, requests, visit, widgets
from pipelines import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline
from pipelines.drawing.attention_maps import AttentionMaps, draw_attention
from pipelines.drawing.images import write_picture


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer, make_text_encoder, make_unet, make_upsampler):
    folder = tmp_path_factory.mktemp("model") / "tiny-model"
    save_tiny_model(folder, tokenizer, make_text_encoder, make_unet, make_upsampler)
    with serve(folder, tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def pipe(served: Served):
    return served.load()


@pytest.fixture(scope="module")
def client(served: Served, tmp_path_factory):
    return Client(served.url, verbose=False, download_files=str(tmp_path_factory.mktemp("pictures")))


def generate(client: Client, *arguments, **options) -> tuple[list[Path], int]:
    """The files that /generate returned, and the seed of the first."""
    gallery, seed = client.predict(*arguments, **options, api_name="/generate")
    return [Path(item["image"]) for item in gallery], seed


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_a_model_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(app, "MODEL", str(tmp_path / "nosuch"))
    with pytest.raises(SystemExit, match="app.py: .*nosuch' cannot be loaded: .*neither a folder nor a name"):
        app.main()


def test_a_prompt_alone_draws_what_the_pipeline_draws_by_itself(client, pipe):
    (file,), seed = generate(client, "a corgi in a party hat")
    picture = expected(pipe, "a corgi in a party hat", seed)
    assert same_picture(pixels(file), picture)
    # the comparison can tell: other words, another seed, other settings are other pictures
    for other in (
        expected(pipe, "a red heart", seed),
        expected(pipe, "a corgi in a party hat", seed + 1),
        expected(pipe, "a corgi in a party hat", seed, num_inference_steps=7),
        expected(pipe, "a corgi in a party hat", seed, guidance_scale=3.4),
    ):
        assert not same_picture(picture, other)


def test_the_same_seed_draws_the_same_picture_and_no_seed_a_new_one(client):
    (first,), seed = generate(client, "a cat", seed=7)
    (again,), _ = generate(client, "a cat", seed=7)
    assert seed == 7
    assert np.array_equal(pixels(first), pixels(again))

    (one,), seed_one = generate(client, "a cat")
    (two,), seed_two = generate(client, "a cat")
    assert seed_one != seed_two
    assert not same_picture(pixels(one), pixels(two))


def test_every_setting_reaches_the_pipeline(client, pipe):
    (file,), seed = generate(client, "a cat", "a dog", "Noto", 9, 2.5, 123)
    assert seed == 123
    options = {"negative_prompt": "a dog", "num_inference_steps": 9, "guidance_scale": 2.5}
    picture = expected(pipe, "a cat, noto style", 123, **options)
    assert same_picture(pixels(file), picture)
    assert not same_picture(picture, expected(pipe, "a cat", 123, **options))
    del options["negative_prompt"]
    assert not same_picture(picture, expected(pipe, "a cat, noto style", 123, **options))


@pytest.mark.parametrize("style", requests.STYLE_PHRASES)
def test_each_style_says_what_its_training_captions_say(style):
    from training.data.emoji import STYLES

    assert requests.full_prompt("a red heart", style) == f"a red heart, {requests.STYLE_PHRASES[style]}"
    assert requests.STYLE_PHRASES[style].removesuffix(" style") in STYLES.values()


def test_each_picture_of_several_can_be_drawn_again_by_its_own_seed(client, pipe):
    files, seed = generate(client, "a cat", seed=40, num_images_per_prompt=3)
    assert seed == 40
    assert len(files) == 3
    for i, file in enumerate(files):
        assert same_picture(pixels(file), expected(pipe, "a cat", 40 + i))


def test_seeds_after_the_last_begin_again(client, pipe):
    files, _ = generate(client, "a cat", seed=requests.MAX_SEED, num_images_per_prompt=2)
    assert same_picture(pixels(files[0]), expected(pipe, "a cat", requests.MAX_SEED))
    assert same_picture(pixels(files[1]), expected(pipe, "a cat", 0))


def test_a_file_tells_its_picture_and_holds_its_settings(client):
    (file,), _ = generate(client, 'A "cat", naïve/… 猫', "a dog", "Noto", seed=5)
    assert file.name == "a-cat-naïve-猫-noto-style_seed5.png"
    with Image.open(file) as image:
        assert image.size == (SIDE, SIDE)
        assert image.text == {
            "prompt": 'A "cat", naïve/… 猫, noto style',
            "negative_prompt": "a dog",
            "seed": "5",
            "num_inference_steps": "6",
            "guidance_scale": "3.5",
            "scheduler": "DDPMScheduler",
            "model": "tiny-model",
            "Software": "Corgi",
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"seed": 1.5}, "whole number from 0 to 4294967295"),
        ({"seed": -2}, "whole number from 0 to 4294967295, or -1 for a new one; it is -2"),
        ({"seed": 2**32}, "whole number"),
        ({"seed": "seven"}, "whole number"),
        ({"style": "Cubist"}, "Cubist"),
        ({"num_inference_steps": 0}, "less than minimum"),
        ({"num_images_per_prompt": 100}, "greater than maximum"),
        (
            {"num_inference_steps": TRAIN_TIMESTEPS + 1},
            str(TRAIN_TIMESTEPS),
        ),  # in the slider's reach, not in this model's
    ],
)
def test_what_is_wrong_reaches_the_caller(client, options, message):
    with pytest.raises(AppError, match=re.escape(message)):
        generate(client, **{"prompt": "a cat", **options})


def test_the_api_asks_for_prompt_and_picture_and_nothing_else(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    needed = {"/generate": ["prompt"], "/edit": ["image", "prompt"], "/enlarge": ["image"]}
    assert list(endpoints) == list(needed)
    for name, endpoint in endpoints.items():
        parameters = endpoint["parameters"]
        assert parameters[0]["parameter_name"] == needed[name][0]
        required = [p["parameter_name"] for p in parameters if not p["parameter_has_default"]]
        assert required == needed[name]


# ---- the guidance and sizes of /generate


def test_every_advanced_setting_reaches_the_pipeline_and_the_file(client, pipe):
    asked = {
        "guidance_rescale": 0.5,
        "guidance_from": 1,
        "guidance_to": 9,
        "combined_prompt": "a crown",
        "combined_weight": -0.5,
        "clip_guidance_scale": 4,
        "classifier_guidance_scale": 6,
        "class_labels": LABELS[1],
        "num_candidates": 2,
    }
    options = {
        "guidance_rescale": 0.5,
        "guidance_interval": (1, 9),
        "combined_prompts": {"a crown": -0.5},
        "clip_guidance_scale": 4,
        "classifier_guidance_scale": 6,
        "class_labels": LABELS[1],
        "num_candidates": 2,
    }
    (file,), _ = generate(client, "a cat", seed=11, **asked)
    picture = expected(pipe, "a cat", 11, **options)
    assert same_picture(pixels(file), picture)
    for name in options.keys() - {"class_labels", "classifier_guidance_scale"}:  # each of them shows
        fewer = {key: value for key, value in options.items() if key != name}
        assert not same_picture(picture, expected(pipe, "a cat", 11, **fewer)), name
    assert not same_picture(picture, expected(pipe, "a cat", 11, **options | {"class_labels": LABELS[0]}))
    with Image.open(file) as image:
        written = {
            key: image.text[key]
            for key in ("clip_guidance_scale", "classifier_guidance_scale", "num_candidates")
        }
        assert written == {
            "clip_guidance_scale": "4",
            "classifier_guidance_scale": "6",
            "num_candidates": "2",
        }
        assert image.text["combined_prompts"] == '{"a crown": -0.5}'
        assert json.loads(image.text["guidance_interval"]) == [1, 9]


def test_guidance_stands_where_the_model_has_it(pipe, tmp_path):
    """The model's own of CLIP guidance only where it has the CLIP for it."""
    parts = dict(pipe.components)
    for noisy_clip, shown in ((parts.pop("noisy_clip"), 1.5), (None, 0)):
        own = TextToImagePipeline(
            **parts, noisy_clip=noisy_clip, default_guidance_scale=2.5, default_clip_guidance_scale=1.5
        )
        with app.gr.Blocks():
            tab = create.create_tab(own, app.gr.State([]))
        fields = tab.fields
        assert (fields["guidance_scale"].value, fields["clip_guidance_scale"].value) == (2.5, shown)
        about = {"prompt": "a cat", "Software": "Corgi"}  # a picture of a guidance that was off, so not said
        file = write_picture(Image.new("RGB", (SIDE, SIDE)), tmp_path, "cat", about)
        _, updates = visit.restore(str(file), {"create": tab}, "tiny-model")
        assert updates[fields["clip_guidance_scale"]] == 0


def test_several_of_the_best_have_a_seed_each(client, pipe):
    files, _ = generate(client, "a cat", seed=60, num_images_per_prompt=2, num_candidates=3)
    for i, file in enumerate(files):
        assert same_picture(pixels(file), expected(pipe, "a cat", 60 + i, num_candidates=3))


def test_the_large_size_shows_the_small_picture_first(client, pipe):
    job = client.submit("a cat", seed=8, num_images_per_prompt=2, size=4 * SIDE, api_name="/generate")
    job.result()
    small, large = ([Path(item["image"]) for item in pictures] for pictures, _ in job.outputs())
    for i in range(2):
        assert same_picture(pixels(small[i]), expected(pipe, "a cat", 8 + i))
        both = expected(pipe, "a cat", 8 + i, height=4 * SIDE, width=4 * SIDE)
        assert same_picture(pixels(large[i]), both)


def test_attention_to_words_is_drawn_beside_the_pictures(client, pipe):
    files, seed = generate(
        client, "a cat with a crown", attention_words="crown, cat", num_images_per_prompt=2
    )
    generators = requests.generators([seed, seed + 1])
    with AttentionMaps(pipe, "a cat with a crown", ["cat", "crown"]) as maps:
        images = pipe(
            "a cat with a crown", num_images_per_prompt=2, generator=generators, callback_on_step_end=maps
        ).images
    drawn = [images[0], images[1]]
    for word in ("crown", "cat"):
        drawn += [draw_attention(image, maps[word][i]) for i, image in enumerate(images)]
    assert len(files) == len(drawn) == 6
    for file, picture in zip(files, drawn, strict=True):
        assert same_picture(pixels(file), np.asarray(picture))


# ---- names of 0.1


def test_old_fields_of_generate_work_with_a_warning(client, pipe):
    old = {"steps": 2, "guidance": 1.5, "class_label": LABELS[2], "best_of": 2, "num_images": 2}
    job = client.submit("a cat", seed=4, classifier_guidance_scale=6, **old, api_name="/generate")
    gallery, _ = job.result()
    options = {"num_inference_steps": 2, "guidance_scale": 1.5, "num_candidates": 2}
    options |= {"class_labels": LABELS[2], "classifier_guidance_scale": 6}
    assert len(gallery) == 2
    for i, item in enumerate(gallery):
        assert same_picture(pixels(Path(item["image"])), expected(pipe, "a cat", 4 + i, **options))
    for options in ({"steps": 251}, {"class_label": "cars"}):  # with the limits of the new ones
        with pytest.raises(AppError, match="251 is greater than maximum|cars"):
            generate(client, "a cat", **options)


def test_old_names_are_told_once(monkeypatch):
    told = []

    def draw(pipe, asked, history, progress):
        yield pipe, asked, history

    monkeypatch.setattr(requests.gr, "Warning", told.append)
    fields, renamed = (
        ("prompt", "num_inference_steps", "guidance_scale"),
        {
            "steps": "num_inference_steps",
            "guidance": "guidance_scale",
        },
    )
    run = requests.event(draw, "pipe", fields, renamed)
    new = {"prompt": "a cat", "num_inference_steps": 6, "guidance_scale": 2.0}
    assert list(run(*new.values(), ["visit"], None, None, None)) == [("pipe", new, ["visit"])]
    assert told == []
    changed = new | {"num_inference_steps": 2, "guidance_scale": 0}
    assert list(run(*new.values(), [], 2, 0, None)) == [("pipe", changed, [])]
    assert told == ["`steps` is now `num_inference_steps`; `guidance` is now `guidance_scale`."]


def test_an_old_field_is_told_to_the_caller(client, served):
    """Gradio's client keeps what it is told to itself, so the queue is asked."""
    dependencies = client.config["dependencies"]
    index = next(i for i, one in enumerate(dependencies) if one["api_name"] == "generate")
    parameters = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/generate"]
    values = {one["parameter_name"]: one["parameter_default"] for one in parameters["parameters"]}
    asked = list((values | {"prompt": "a cat", "steps": 2, "guidance": 1.5}).values())
    asked.insert(len(create.ORDER.split()), None)  # the history
    body = json.dumps({"data": asked, "fn_index": dependencies[index]["id"], "session_hash": "told"})
    headers = {"Content-Type": "application/json"}
    join = urllib.request.Request(f"{served.url}/gradio_api/queue/join", body.encode(), headers)
    urllib.request.urlopen(join, timeout=20).close()
    told = []
    with urllib.request.urlopen(f"{served.url}/gradio_api/queue/data?session_hash=told", timeout=60) as lines:
        for line in lines:
            message = json.loads(line.removeprefix(b"data:")) if line.strip() else {"msg": ""}
            if message["msg"] == "log":
                told.append((message["level"], message["log"]))
            if message["msg"] == "process_completed":
                assert message["success"]
                break
    said = "`num_inference_steps`; `guidance` is now `guidance_scale`."
    assert told == [("warning", f"`steps` is now {said}")]


def test_positions_are_those_of_before(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {name: [p["parameter_name"] for p in one["parameters"]] for name, one in endpoints.items()}
    assert (
        names["/generate"]
        == (
            "prompt negative_prompt style num_inference_steps guidance_scale seed num_images_per_prompt size "
            "guidance_rescale guidance_from guidance_to combined_prompt combined_weight clip_guidance_scale "
            "clip_guidance classifier_guidance_scale class_labels num_candidates attention_words "
            "steps guidance num_images class_label best_of"
        ).split()
    )
    assert (
        names["/edit"]
        == (
            "image prompt mode left right top bottom strength style negative_prompt num_inference_steps "
            "guidance_scale seed context jump_n_sample mask_image guidance_rescale guidance_from guidance_to "
            "combined_prompt combined_weight clip_guidance_scale clip_guidance num_candidates "
            "classifier_guidance_scale class_labels steps guidance resampling mask"
        ).split()
    )
    assert names["/enlarge"] == "image noise_level num_inference_steps seed prompt steps".split()


def test_old_fields_of_edit_and_enlarge_work(client, photo, tmp_path):
    mask = mask_file(tmp_path, (SIDE, SIDE), (6, 3, 20, 25))
    image = handle_file(str(photo[SIDE]))
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "jump_n_sample": 2}
    new = edited(client, photo[SIDE], mask=mask, seed=4, **settings)
    old = {"steps": 3, "guidance": 2.0, "resampling": 2, "mask": handle_file(str(mask)), "seed": 4}
    result, _ = client.predict(image, "a cat", **old, api_name="/edit")
    assert np.array_equal(picture_of(result), new)
    assert not np.array_equal(new, edited(client, photo[SIDE], mask=mask, seed=4))
    result, _ = client.predict(image, steps=1, seed=3, api_name="/enlarge")
    assert np.array_equal(picture_of(result), enlarged(client, photo[SIDE], num_inference_steps=1, seed=3))


# ---- /edit


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> dict[int, Path]:
    """Pictures that no model drew, by their width: SIDE x SIDE, and larger ones that are not square."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    made = {}
    for size in ((SIDE, SIDE), (150, 90)):
        made[size[0]] = folder / f"{size[0]}.png"
        small.resize(size, Image.Resampling.BICUBIC).save(made[size[0]])
    return made


def picture_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def mask_file(folder: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """A black mask with a white box, or none where the box is empty."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(folder / "mask.png")
    return folder / "mask.png"


def edited(client: Client, image: Path, prompt: str = "a cat", **options) -> np.ndarray:
    if "mask" in options:
        options["mask_image"] = handle_file(str(options.pop("mask")))
    result, _ = client.predict(handle_file(str(image)), prompt, **options, api_name="/edit")
    return picture_of(result)


def test_a_part_is_repainted_and_the_rest_stays(client, pipe, photo, tmp_path):
    box = (6, 3, 20, 25)
    mask = mask_file(tmp_path, (SIDE, SIDE), box)
    result = edited(client, photo[SIDE], mask=mask, seed=4, style="Noto", guidance_scale=2.0, jump_n_sample=2)
    paint = InpaintPipeline.from_pipe(pipe)
    options = {"jump_n_sample": 2, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(4)}
    with Image.open(photo[SIDE]) as image, Image.open(mask) as white:
        drawn = paint("a cat, noto style", image=image, mask_image=white, **options).images[0]
    assert same_picture(result, np.asarray(drawn))
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    original = picture_of(photo[SIDE])
    assert np.array_equal(result[~inside], original[~inside])
    assert (result[inside] != original[inside]).mean() > 0.5


@pytest.mark.parametrize("context", [0, 100])
def test_a_larger_picture_is_repainted_at_its_own_size(client, photo, tmp_path, context):
    box = (20, 10, 110, 70)  # larger than the model's picture
    mask = mask_file(tmp_path, (150, 90), box)
    result, original = edited(client, photo[150], mask=mask, context=context), picture_of(photo[150])
    inside = np.zeros((90, 150), dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert np.array_equal(result[~inside], original[~inside])
    assert (result[inside] != original[inside]).mean() > 0.5


def test_the_canvas_grows_around_the_picture(client, pipe, photo):
    sides = {"left": 5, "right": 0, "top": 17, "bottom": 1}
    result = edited(client, photo[SIDE], mode="extend", seed=2, **sides)
    paint = InpaintPipeline.from_pipe(pipe)
    with Image.open(photo[SIDE]) as image:
        drawn = paint.outpaint("a cat", image, generator=torch.Generator().manual_seed(2), **sides).images[0]
    assert same_picture(result, np.asarray(drawn))
    assert np.array_equal(result[17 : 17 + SIDE, 5:], picture_of(photo[SIDE]))


@pytest.mark.parametrize("sides", [(0, 33, 0, 0), (7, 1, 100, 3)])
def test_the_canvas_of_a_larger_picture_grows_by_the_pixels_that_were_asked_for(client, photo, sides):
    left, right, top, bottom = sides
    result = edited(
        client,
        photo[150],
        mode="extend",
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        num_inference_steps=2,
    )
    assert result.shape == (90 + top + bottom, 150 + left + right, 3)
    assert np.array_equal(result[top : top + 90, left : left + 150], picture_of(photo[150]))


def test_restyling_is_image_to_image(client, pipe, photo):
    result = edited(client, photo[SIDE], mode="restyle", style="Flat", strength=0.5, seed=9)
    redraw = ImageToImagePipeline.from_pipe(pipe)
    options = {"strength": 0.5, "generator": torch.Generator().manual_seed(9)}
    with Image.open(photo[SIDE]) as image:
        drawn = redraw("a cat, flat style", image=image, **options).images[0]
    assert same_picture(result, np.asarray(drawn))
    large = edited(client, photo[150], mode="restyle")  # drawn within 32 x 32, enlarged by 4
    assert large.shape == (76, 128, 3)


@pytest.mark.parametrize("mode", ["repaint", "restyle"])
def test_every_advanced_setting_reaches_an_edit_and_its_file(client, pipe, photo, tmp_path, mode):
    mask = mask_file(tmp_path, (SIDE, SIDE), (6, 3, 20, 25))
    asked = {"guidance_from": 1, "guidance_to": 9, "combined_prompt": "a crown", "combined_weight": -0.5}
    options = {
        "guidance_rescale": 0.5, "clip_guidance_scale": 4, "classifier_guidance_scale": 6,
        "class_labels": LABELS[1], "num_candidates": 2,
    }  # fmt: skip
    file, _ = client.predict(
        handle_file(str(photo[SIDE])), "a cat", mode, seed=11, strength=1, **asked, **options,
        mask_image=handle_file(str(mask)), api_name="/edit",
    )  # fmt: skip
    options |= {"guidance_interval": (1, 9), "combined_prompts": {"a crown": -0.5}}
    call = {"mask_image": Image.open(mask)} if mode == "repaint" else {"strength": 1.0}
    other = (InpaintPipeline if mode == "repaint" else ImageToImagePipeline).from_pipe(pipe)

    def drawn(**options) -> np.ndarray:
        given = {"image": Image.open(photo[SIDE]), "generator": torch.Generator().manual_seed(11)}
        return np.asarray(other("a cat", **given, **call, **options).images[0])

    picture = picture_of(file)
    assert same_picture(picture, drawn(**options))
    for name in options.keys() - {"class_labels", "classifier_guidance_scale"}:  # each of them shows
        fewer = {key: value for key, value in options.items() if key != name}
        assert not same_picture(picture, drawn(**fewer)), name
    assert not same_picture(picture, drawn(**options | {"class_labels": LABELS[0]}))
    with Image.open(file) as image:
        text = image.text
    assert (text["task"], text["num_candidates"], text["class_labels"]) == (mode, "2", LABELS[1])
    assert (text["clip_guidance_scale"], text["guidance_rescale"]) == ("4", "0.5")
    assert json.loads(text["combined_prompts"]) == {"a crown": -0.5}


def test_positions_of_an_edit_are_those_of_before(client, photo):
    sides, settings = (0, 0, 0, 0), {"style": "Noto", "negative_prompt": "a dog", "seed": 4, "strength": 0.5}
    new = edited(client, photo[SIDE], mode="restyle", num_inference_steps=4, guidance_scale=2.0, **settings)
    old = ("a cat", "restyle", *sides, 0.5, "Noto", "a dog", 4, 2.0, 4, 100, 1, None)
    result, _ = client.predict(handle_file(str(photo[SIDE])), *old, api_name="/edit")
    assert np.array_equal(picture_of(result), new)


# ---- /enlarge, and pictures of every kind


def enlarged(client: Client, image: Path, **options) -> np.ndarray:
    return picture_of(client.predict(handle_file(str(image)), **options, api_name="/enlarge")[0])


def test_a_picture_is_enlarged_with_its_settings(client, pipe, photo):
    result = enlarged(client, photo[SIDE], noise_level=150, num_inference_steps=2, seed=3)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    with Image.open(photo[SIDE]) as image:
        drawn = pipe.upsampler(image=image, noise_level=150, **options).images[0]
    assert same_picture(result, np.asarray(drawn))


@pytest.mark.parametrize("kind", ["RGBA", "CMYK", "I;16", "lying"])
def test_pictures_of_every_mode_are_taken_as_a_person_sees_them(client, photo, tmp_path, kind):
    colour = Image.open(photo[SIDE])
    seen = np.asarray(colour)
    if kind == "RGBA":  # transparent parts are white, whatever colour hides there
        shown = np.zeros((SIDE, SIDE), dtype=bool)
        shown[:, 8:] = True
        seen = np.where(shown[..., None], seen, 255).astype(np.uint8)
        colour.putalpha(Image.fromarray(shown))
        colour.save(tmp_path / "picture.png")
    elif kind == "CMYK":
        colour.convert("CMYK").save(tmp_path / "picture.tif")
    elif kind == "I;16":
        grey = np.asarray(colour.convert("L"))
        seen = np.repeat(grey[..., None], 3, axis=2)
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "picture.png")
    else:  # a camera's, held upright: EXIF says to turn it by a quarter
        exif = Image.Exif()
        exif[0x0112] = 6
        colour.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "picture.png", exif=exif)
    (given,) = tmp_path.iterdir()
    Image.fromarray(seen).save(tmp_path / "seen.png")
    assert np.array_equal(
        enlarged(client, given, seed=1, num_inference_steps=1),
        enlarged(client, tmp_path / "seen.png", seed=1, num_inference_steps=1),
    )


def test_a_picture_of_100_megapixels_is_refused_with_the_limit(client, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    for job in (
        lambda: enlarged(client, tmp_path / "huge.png"),
        lambda: edited(client, tmp_path / "huge.png"),
    ):
        with pytest.raises(AppError, match="100 million; at most 67 million are taken"):
            job()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing is painted over"),
        ({"mask": (0, 0, 0, 0)}, "is black everywhere"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"mode": "restyle", "strength": 0.1, "num_inference_steps": 1}, "strength"),
        (
            {"mode": "extend", "left": 65},
            "“Left” must be 0 to 64 pixels for this picture of 32 × 32; it is 65",
        ),
        ({"mode": "extend", "left": 0, "right": 0, "top": 0, "bottom": 0}, "at least one side above 0"),
        (
            {"mode": "extend", "top": None},
            "“Top” must be 0 to 64 pixels for this picture of 32 × 32; it is empty",
        ),
        ({"mode": "cubist"}, "cubist"),
        ({"mode": "extend", "num_inference_steps": TRAIN_TIMESTEPS + 1}, str(TRAIN_TIMESTEPS)),
    ],
)
def test_what_is_wrong_with_an_edit_reaches_the_caller(client, photo, tmp_path, options, message):
    if "mask" in options:
        options = options | {"mask": mask_file(tmp_path, (SIDE, SIDE), options["mask"])}
    with pytest.raises(AppError, match=re.escape(message)):
        edited(client, photo[SIDE], **options)


def test_a_long_picture_of_few_pixels_is_enlarged(client, pipe, tmp_path):
    """The limit is of pixels in all, not of a side."""
    pattern = np.random.default_rng(0).integers(0, 256, (SIDE, 520, 3), dtype=np.uint8)
    Image.fromarray(pattern).save(tmp_path / "long.png")
    result = enlarged(client, tmp_path / "long.png", num_inference_steps=1, seed=0)
    assert result.shape == (SIDE * pipe.upsampler.scale, 520 * pipe.upsampler.scale, 3)


def test_what_cannot_be_enlarged_is_told(client, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    Image.new("RGB", (513, 512)).save(tmp_path / "large.png")
    with pytest.raises(AppError, match="This file cannot be read as a picture"):
        enlarged(client, tmp_path / "words.png")
    with pytest.raises(AppError, match="513 × 512 pixels; at most 512 × 512"):
        enlarged(client, tmp_path / "large.png")
    with pytest.raises(AppError, match="There is no picture yet"):
        client.predict(None, api_name="/enlarge")


# ---- without a server


def test_a_visit_is_remembered_newest_first():
    assert requests.remember(["a"], ["b", "c"]) == ["c", "b", "a"]
    many = [str(i) for i in range(requests.MAX_VISIT)]
    assert requests.remember(many, ["x"]) == ["x", *many[:-1]]


def test_words_and_style_come_apart_as_they_were_put_together():
    for style in [requests.ANY_STYLE, *requests.STYLE_PHRASES]:
        assert requests.split_prompt(requests.full_prompt("a red heart, big", style)) == (
            "a red heart, big",
            style,
        )


def test_a_mask_is_white_where_half_a_pixel_is_painted():
    layer = Image.new("RGBA", (512, 512))
    layer.paste((255, 90, 0, 255), (100, 0, 304, 512))  # of pixels 16 wide: 6 and a quarter .. 19
    layer.paste((255, 90, 0, 100), (400, 0, 512, 512))  # the brush's soft edge does not count
    columns = np.asarray(edit.painted([layer], (32, 32))).max(axis=0)
    assert np.flatnonzero(columns).tolist() == list(range(6, 19))
    assert set(np.unique(edit.painted([layer], (700, 300)))) == {0, 255}


@pytest.mark.parametrize(("interval", "ends"), [("[1, 9]", (1, 9)), ("[2.5, Infinity]", (2.5, 0))])
def test_a_pictures_settings_come_back_into_their_widgets(pipe, tmp_path, interval, ends):
    """Each from the PNG; what it does not hold at its first value; an interval without an end ends at 0."""
    about = {
        "prompt": "a cat, noto style", "negative_prompt": "a dog", "num_inference_steps": "7",
        "guidance_scale": "2.5", "seed": "5", "guidance_interval": interval, "num_candidates": "3",
        "combined_prompts": '{"a crown": -0.5}', "attention_words": "cat", "Software": "Corgi",
        "width": str(SIDE), "height": str(SIDE),
    }  # fmt: skip
    file = write_picture(Image.new("RGB", (SIDE, SIDE)), tmp_path, "cat", about)
    with app.gr.Blocks():
        tab = create.create_tab(pipe, app.gr.State([]))
    name, updates = visit.restore(str(file), {"create": tab}, "tiny-model")
    assert name == "create"
    low, high = ends
    back = {
        "prompt": "a cat", "style": "Noto", "negative_prompt": "a dog", "num_inference_steps": 7,
        "guidance_scale": 2.5, "seed": 5, "guidance_from": low, "guidance_to": high, "num_candidates": 3,
        "combined_prompt": "a crown", "combined_weight": -0.5, "attention_words": "cat", "size": SIDE,
        "new_each_time": False, "clip_guidance_scale": 0,
    }  # fmt: skip
    for key, field in tab.fields.items():
        assert updates[field] == back.get(key, field.value), key
    assert back.keys() <= tab.fields.keys() and updates[tab.picture] == str(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "251"}, "num_inference_steps is 251"),
        ({"num_inference_steps": "many"}, "num_inference_steps is 'many', not a number"),
        ({"seed": "nan"}, "seed is nan"),
        ({"Software": "Another"}, "carries no settings"),
    ],
)
def test_settings_that_the_page_does_not_have_are_told(pipe, tmp_path, settings, message):
    about = {"prompt": "a cat", "Software": "Corgi", **settings}
    file = write_picture(Image.new("RGB", (SIDE, SIDE)), tmp_path, "cat", about)
    with app.gr.Blocks():
        tab = create.create_tab(pipe, app.gr.State([]))
    with pytest.raises(app.gr.Error, match=message):
        visit.restore(str(file), {"create": tab}, "tiny-model")


def test_the_queue_turns_people_away_when_it_is_full(client):
    first = client.submit(
        "a cat", num_inference_steps=40, num_images_per_prompt=widgets.MAX_IMAGES, api_name="/generate"
    )
    jobs = [
        client.submit("a cat", num_inference_steps=1, api_name="/generate")
        for _ in range(app.MAX_WAITING + 5)
    ]
    problems = [job.exception() for job in jobs]
    turned_away = [str(problem) for problem in problems if problem is not None]
    assert first.exception() is None
    assert 1 <= len(turned_away) <= 5
    assert all("queue" in problem.lower() and "full" in problem.lower() for problem in turned_away)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no second loopback address")
def test_host_and_port_are_gradios_own_variables_and_a_model_alone_will_do(served, monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.2")
    demo = app.build_demo(TextToImagePipeline.from_pretrained(served.folder))
    monkeypatch.setenv("GRADIO_SERVER_PORT", "port")
    with pytest.raises(SystemExit, match="GRADIO_SERVER_PORT must be 1 to 65535, got 'port'"):
        app.launch(demo)
    with socket.socket() as taken:  # no other port is taken instead
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(OSError, match="Cannot find empty port"):
            app.launch(demo, prevent_thread_lock=True, quiet=True)
    monkeypatch.delenv("GRADIO_SERVER_PORT")
    app.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        assert demo.local_url.startswith("http://127.0.0.2:")
        config = json.load(urllib.request.urlopen(f"{demo.local_url}config", timeout=20))
        said = json.dumps(config, ensure_ascii=False)
        for variable in (
            "CORGI_UPSAMPLER to the folder of one",
            "noisy_clip in it",
            "noisy_classifier in it",
        ):
            assert variable in said
        names = [one["api_name"] for one in config["dependencies"] if one["api_visibility"] == "public"]
        assert names == ["generate", "edit"]
    finally:
        demo.close()


def test_the_page_asks_nothing_of_the_network(client, served):
    generate(client, "a cat")
    assert served.outside.read_text() == ""
    html = urllib.request.urlopen(served.url, timeout=20).read().decode()
    fetched = re.findall(r"""(?:src|href)\s*=\s*["'](https?:)?//([^/"']+)""", html)
    assert fetched == []
