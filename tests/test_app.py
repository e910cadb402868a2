"""The page's API through gradio's own client, against `python app.py` with a tiny model."""

import re
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from browser.served import SIDE, TRAIN_TIMESTEPS, Served, expected, same_picture, save_tiny_model, serve
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import app


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer, make_text_encoder, make_unet):
    folder = tmp_path_factory.mktemp("model") / "tiny-model"
    save_tiny_model(folder, tokenizer, make_text_encoder, make_unet)
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


@pytest.mark.parametrize("style", app.STYLE_PHRASES)
def test_each_style_says_what_its_training_captions_say(style):
    from training.emoji import STYLES

    assert app.full_prompt("a red heart", style) == f"a red heart, {app.STYLE_PHRASES[style]}"
    assert app.STYLE_PHRASES[style].removesuffix(" style") in STYLES.values()


def test_each_picture_of_several_can_be_drawn_again_by_its_own_seed(client, pipe):
    files, seed = generate(client, "a cat", seed=40, num_images=3)
    assert seed == 40
    assert len(files) == 3
    for i, file in enumerate(files):
        assert same_picture(pixels(file), expected(pipe, "a cat", 40 + i))


def test_seeds_after_the_last_begin_again(client, pipe):
    files, _ = generate(client, "a cat", seed=app.MAX_SEED, num_images=2)
    assert same_picture(pixels(files[0]), expected(pipe, "a cat", app.MAX_SEED))
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
            "steps": "6",
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
        ({"steps": 0}, "less than minimum"),
        ({"num_images": 100}, "greater than maximum"),
        ({"steps": TRAIN_TIMESTEPS + 1}, str(TRAIN_TIMESTEPS)),  # in the slider's reach, not in this model's
    ],
)
def test_what_is_wrong_reaches_the_caller(client, options, message):
    with pytest.raises(AppError, match=re.escape(message)):
        generate(client, **{"prompt": "a cat", **options})


def test_the_api_asks_for_a_prompt_and_nothing_else(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/generate"]
    parameters = endpoints["/generate"]["parameters"]
    assert parameters[0]["parameter_name"] == "prompt"
    assert [p["parameter_name"] for p in parameters if not p["parameter_has_default"]] == ["prompt"]


def test_the_queue_turns_people_away_when_it_is_full(client):
    first = client.submit("a cat", steps=40, num_images=app.MAX_IMAGES, api_name="/generate")
    jobs = [client.submit("a cat", steps=1, api_name="/generate") for _ in range(app.MAX_WAITING + 5)]
    problems = [job.exception() for job in jobs]
    turned_away = [str(problem) for problem in problems if problem is not None]
    assert first.exception() is None
    assert 1 <= len(turned_away) <= 5
    assert all("queue" in problem.lower() and "full" in problem.lower() for problem in turned_away)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no second loopback address")
def test_host_and_port_are_gradios_own_variables(pipe, monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.2")
    demo = app.build_demo(pipe)
    app.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        assert demo.local_url.startswith("http://127.0.0.2:")
        assert urllib.request.urlopen(demo.local_url, timeout=20).status == 200
    finally:
        demo.close()


def test_the_page_asks_nothing_of_the_network(client, served):
    generate(client, "a cat")
    assert served.outside.read_text() == ""
    html = urllib.request.urlopen(served.url, timeout=20).read().decode()
    fetched = re.findall(r"""(?:src|href)\s*=\s*["'](https?:)?//([^/"']+)""", html)
    assert fetched == []
