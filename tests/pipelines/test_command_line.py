"""`python -m pipelines`: what it writes, what it says, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT

from pipelines import DDPMScheduler, TextToImagePipeline, family
from pipelines import __main__ as cli
from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.components.noisy_clip import NoisyCLIP
from pipelines.drawing import images as png
from pipelines.drawing.request import ARGUMENTS, IMAGE, TEXT
from pipelines.super_resolution import SuperResolutionPipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer, make_text_encoder, make_unet) -> Path:
    """A saved tiny model of 16 x 16 pixels, 4 steps and guidance 2.5."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    TextToImagePipeline(
        tokenizer,
        make_text_encoder(),
        make_unet(patch_size=2),
        DDPMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        default_guidance_scale=2.5,
        default_num_inference_steps=4,
    ).save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def draw(model: Path, prompt: str, seed: int, **call) -> np.ndarray:
    """The picture of one seed, drawn alone, as integers."""
    pipe = TextToImagePipeline.from_pretrained(model)
    if (scheduler := call.pop("scheduler", None)) is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return np.array(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]).astype(int)


def test_a_whole_run_in_its_own_process(model, tmp_path):
    """From the shell, in another folder; a fresh process proves that the folder names what it needs."""
    command = [sys.executable, "-m", "pipelines", "A corgi, in a party hat! 🎉", "--model", model]
    command += ["--seed", "7", "--num-images-per-prompt", "2", "--out", "made/here"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"made/here/a-corgi-in-a-party-hat_seed{seed}.png" for seed in (7, 8)]
    assert len(lines) == 3 and re.fullmatch(r"2 pictures in \d+\.\d s", lines[2])
    assert "4/4" in done.stderr  # the progress bar
    assert sorted(os.listdir(tmp_path / "made/here")) == [Path(line).name for line in lines[:2]]
    for seed, line in zip((7, 8), lines, strict=False):
        picture = Image.open(tmp_path / line)
        alone = draw(model, "A corgi, in a party hat! 🎉", seed)
        assert (
            np.abs(np.array(picture).astype(int) - alone).max() <= 1
        )  # a batch of two rounds like one, or next to it
        assert picture.text == {
            "prompt": "A corgi, in a party hat! 🎉",
            "negative_prompt": "",
            "seed": str(seed),
            "num_inference_steps": "4",
            "guidance_scale": "2.5",
            "scheduler": "DDPMScheduler",
            "width": "16",
            "height": "16",
            "model": model.name,
            "Software": "Corgi",
        }


def test_options_reach_the_pipeline(model, tmp_path, capsys):
    call = [
        "--num-inference-steps",
        3,
        "--guidance_scale",
        6,
        "--height",
        20,
        "--width",
        28,
        "--negative-prompt",
        "a cat",
    ]
    assert run("an owl", "--model", model, "--out", tmp_path, "--seed", 3, "--scheduler", "euler", *call) == 0
    path = Path(capsys.readouterr().out.splitlines()[0])
    expected = draw(
        model,
        "an owl",
        3,
        scheduler=diffusers.EulerDiscreteScheduler,
        num_inference_steps=3,
        guidance_scale=6.0,
        height=20,
        width=28,
        negative_prompt="a cat",
    )
    picture = Image.open(path)
    assert (np.array(picture).astype(int) == expected).all() and expected.shape == (20, 28, 3)
    said = {
        key: picture.text[key]
        for key in ("negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "height")
    }
    assert said == {
        "negative_prompt": "a cat",
        "num_inference_steps": "3",
        "guidance_scale": "6.0",
        "scheduler": "EulerDiscreteScheduler",
        "height": "20",
    }


def test_guidance_by_other_networks_and_best_of(model, tmp_path, capsys):
    """As the same call in Python; each setting stands in the file, and only where it is on."""
    pipe = TextToImagePipeline.from_pretrained(model)
    torch.manual_seed(0)
    pipe.register_modules(
        noisy_clip=NoisyCLIP(16, 3, 8, 16, 1, 2, 24),
        noisy_classifier=NoisyClassifier(["cold", "warm"], 16, 3, 2, (8, 16), 4, 2),
    )
    guided = tmp_path / "guided"
    pipe.save_pretrained(guided)
    options = ["--clip-guidance-scale", 2, "--classifier-guidance-scale", 3, "--class-labels", "warm"]
    options += ["--num-candidates", 2]
    assert run("an owl", "--model", guided, "--out", tmp_path / "out", "--seed", 3, *options) == 0
    picture = Image.open(capsys.readouterr().out.splitlines()[0])
    expected = draw(
        guided, "an owl", 3, clip_guidance_scale=2.0, classifier_guidance_scale=3.0, class_labels="warm",
        num_candidates=2,
    )  # fmt: skip
    assert (np.array(picture).astype(int) == expected).all()
    said = {"clip_guidance_scale": "2.0", "classifier_guidance_scale": "3.0", "class_labels": "warm"}
    said |= {"num_candidates": "2"}
    assert said.items() <= picture.text.items()
    beside = model.with_name("tiny-guidance")  # what a model without guides takes
    for name in ("noisy_clip", "noisy_classifier"):
        shutil.copytree(guided / name, beside / name)
    try:
        assert run("an owl", "--model", model, "--out", tmp_path / "out", "--seed", 3, *options) == 0
        assert (np.array(Image.open(capsys.readouterr().out.splitlines()[0])) == np.array(picture)).all()
    finally:
        shutil.rmtree(beside)
    assert run("an owl", "--model", model, "--out", tmp_path / "out", "--seed", 3) == 0
    assert not said.keys() & Image.open(capsys.readouterr().out.splitlines()[0]).text.keys()


def test_the_models_own_clip_guidance_takes_the_guide_beside_it(model, tmp_path, capsys):
    """Unless a guidance is given; what was used stands in the file."""
    own = tmp_path / "own"
    shutil.copytree(model, own)
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps(index | {"default_clip_guidance_scale": 2.0}))
    torch.manual_seed(0)
    NoisyCLIP(16, 3, 8, 16, 1, 2, 24).save_pretrained(tmp_path / "own-guidance" / "noisy_clip")
    pictures = []
    for options in (
        [],
        ["--clip-guidance-scale", 2],
        ["--guidance-scale", 2.5],
        ["--clip-guidance-scale", 0],
    ):
        assert run("an owl", "--model", own, "--out", tmp_path / "out", "--seed", 3, *options) == 0
        pictures.append(Image.open(capsys.readouterr().out.splitlines()[0]))
    assert [picture.text.get("clip_guidance_scale") for picture in pictures] == ["2.0", "2.0", None, None]
    assert {picture.text["guidance_scale"] for picture in pictures} == {"2.5"}
    guided, same, plain, off = (np.array(picture).astype(int) for picture in pictures)
    assert (guided == same).all() and (plain == off).all() and (guided != plain).any()
    (tmp_path / "own-guidance").rename(tmp_path / "elsewhere")
    call = ["an owl", "--model", own, "--out", tmp_path / "out", "--seed", 3]
    for options, expected in (
        ([], plain),
        (["--guides", tmp_path / "elsewhere"], guided),
        (["--guidance-scale", 2.5], plain),
    ):
        assert run(*call, *options) == 0
        said = capsys.readouterr()
        assert (np.array(Image.open(said.out.splitlines()[0])) == expected).all()
        assert ("Drawn without the CLIP guidance of 2 that this model asks for" in said.err) == (not options)


def test_large_sizes_take_the_upsampler_beside_the_model(model, make_upsampler, tmp_path, capsys):
    for folder, own in ((model.with_name("tiny-upsampler"), ()), (tmp_path / "other", ("--upsampler",))):
        make_upsampler().save_pretrained(folder)
        options = [*own, folder] if own else []
        call = ["--model", model, "--out", tmp_path, "--seed", 3, "--size", 64, *options]
        try:
            assert run("an owl", *call) == 0
            picture = Image.open(capsys.readouterr().out.splitlines()[0])
            pipe = TextToImagePipeline.from_pretrained(model)
            pipe.upsampler = SuperResolutionPipeline.from_pretrained(folder)
            generator = torch.Generator().manual_seed(3)
            (expected,) = pipe("an owl", height=64, width=64, generator=[generator]).images
            assert picture.size == (64, 64) and picture.text["height"] == "64"
            assert (np.array(picture) == np.array(expected)).all()
        finally:
            shutil.rmtree(folder)


def test_a_model_without_an_upsampler_takes_the_shipped_one(model, tmp_path, capsys):
    assert run("an owl", "--model", model, "--out", tmp_path, "--seed", 3, "--size", 64) == 0
    picture = Image.open(capsys.readouterr().out.splitlines()[0])
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.upsampler = SuperResolutionPipeline.from_pretrained(ROOT / "models" / "emoji-upsampler")
    (expected,) = pipe("an owl", height=64, width=64, generator=[torch.Generator().manual_seed(3)]).images
    assert (np.array(picture) == np.array(expected)).all()


def test_sizes_that_the_model_was_not_trained_at_are_told(model, tmp_path, capsys):
    for size, told in ((16, False), (20, True), (64, False), (72, True)):
        assert (
            run("an owl", "--model", model, "--out", tmp_path, "--num-inference-steps", 1, "--size", size)
            == 0
        )
        assert ("16 or 64 is what it draws well" in capsys.readouterr().err) is told


def test_more_pictures_than_a_batch_keep_their_seeds(model, tmp_path, capsys):
    assert (
        run(
            "a fox",
            "--model",
            model,
            "--out",
            tmp_path,
            "--seed",
            100,
            "--num-images-per-prompt",
            10,
            "--num-inference-steps",
            2,
        )
        == 0
    )
    paths = capsys.readouterr().out.splitlines()[:10]
    assert [Path(path).stem for path in paths] == [f"a-fox_seed{100 + i}" for i in range(10)]
    for i in (0, 9):
        alone = draw(model, "a fox", 100 + i, num_inference_steps=2)
        assert np.abs(np.array(Image.open(paths[i])).astype(int) - alone).max() <= 1


def test_existing_files_stay(model, tmp_path, capsys):
    call = ["a fox", "--model", model, "--out", tmp_path, "--seed", 1, "--num-inference-steps", 1]
    (tmp_path / "a-fox_seed1.png").write_text("somebody else's")
    assert run(*call) == 0 and run(*call) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in lines if line.endswith("png")] == [
        "a-fox_seed1-1.png",
        "a-fox_seed1-2.png",
    ]
    assert (tmp_path / "a-fox_seed1.png").read_text() == "somebody else's"
    assert (tmp_path / "a-fox_seed1-1.png").read_bytes() == (tmp_path / "a-fox_seed1-2.png").read_bytes()
    assert len(os.listdir(tmp_path)) == 3  # no temporary file is left


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken:
        def save(self, file, **kwargs):
            file.write(b"half a pic")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        png.write_picture(Broken(), tmp_path, "x", {})
    assert os.listdir(tmp_path) == []


def test_without_a_seed_each_run_draws_something_else(model, tmp_path, capsys):
    for _ in range(2):
        assert run("a fox", "--model", model, "--out", tmp_path, "--num-inference-steps", 1) == 0
    seeds = {Image.open(path).text["seed"] for path in tmp_path.glob("*.png")}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("A Corgi, in a HAT!", "a-corgi-in-a-hat"),
        ("../../etc/passwd", "etc-passwd"),
        ("🎉", "picture"),
        ("naïve 北京 snake_case", "naïve-北京-snake-case"),
        ("é" * 60, "é" * 40),
        ("x" * 300, "x" * 80),
    ],
)
def test_slug(prompt, expected):
    assert png.slug(prompt) == expected


def broken_model(tmp_path: Path) -> Path:
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    return tmp_path


def empty_model(tmp_path: Path) -> Path:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    return tmp_path


ERRORS = {
    "no model folder": (["x", "--model", "nowhere"], "no model folder nowhere"),
    "folder of something else": (["x", "--model", "."], "no model_index.json"),
    "broken index": (["x", "--model", broken_model], "cannot read"),
    "model without weights": (["x", "--model", empty_model], "cannot load"),
    "empty prompt": ([""], "prompt is empty"),
    "blank prompt": ([" \n "], "prompt is empty"),
    "no prompt": ([], "prompt"),
    "one of two prompts empty": (["a", " "], "prompt is empty"),
    "out below a file": (["x", "--out", "file.txt/out"], "cannot write to --out"),
    "out is a file": (["x", "--out", "file.txt"], "cannot write to --out"),
    "out in a read-only place": (["x", "--out", "/proc/out"], "cannot write to --out"),
    "steps 0": (
        ["x", "--num-inference-steps", "0"],
        "--num-inference-steps must be a whole number above 0, got 0",
    ),
    "steps beyond training": (["x", "--num-inference-steps", "1001"], "1001"),
    "steps not whole": (["x", "--num_inference_steps", "2.5"], "--num_inference_steps"),
    "guidance negative": (
        ["x", "--guidance-scale", "-1"],
        "--guidance-scale must be 0 or more (1 or less is off), got -1.0",
    ),
    "guidance nan": (["x", "--guidance-scale", "nan"], "--guidance-scale must be 0 or more"),
    "seed negative": (["x", "--seed", "-1"], "--seed must be 0 or more"),
    "seed too large": (["x", "--seed", str(2**63)], "--seed"),
    "no pictures": (
        ["x", "--num-images-per-prompt", "0"],
        "--num-images-per-prompt must be a whole number above 0",
    ),
    "height 0": (["x", "--height", "0"], "--height must be a whole number above 0"),
    "width not in patches": (
        ["x", "--width", "17"],
        "--width must be a positive multiple of 2; the nearest",
    ),
    "size not in patches": (["x", "--size", "17"], "--size must be a positive multiple of 2; the nearest"),
    "size and height": (["x", "--size", "64", "--height", "64"], "--size takes the place of"),
    "no upsampler": (["x", "--size", "64", "--upsampler", "nowhere"], "--upsampler must be a folder"),
    "a guidance without its model": (
        ["x", "--clip-guidance-scale", "2"],
        "noisy_clip: --guides PATH takes those of",
    ),
    "guides that are not there": (["x", "--guides", "nowhere"], "--guides must be a folder, got nowhere"),
    "a run, not its pipeline": (
        [
            "x",
            "--model",
            lambda folder: (
                folder / "run",
                (folder / "run" / "pipeline").mkdir(parents=True),
                (folder / "run" / "pipeline" / "model_index.json").touch(),
            )[0],
        ],
        "run/pipeline has one",
    ),
    "a class alone": (["x", "--class-labels", "warm"], "go together, got --class-labels warm alone"),
    "guidance alone": (
        ["x", "--classifier-guidance-scale", "3"],
        "together, got --classifier-guidance-scale alone",
    ),
    "best of none": (["x", "--num-candidates", "0"], "--num-candidates must be a whole number above 0"),
    "unknown scheduler": (["x", "--scheduler", "magic"], "'magic' (choose from"),
}


@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS.keys())
def test_mistakes_get_one_line_and_exit_code_2(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    arguments = [item(tmp_path) if callable(item) else item for item in arguments]
    with pytest.raises(SystemExit) as exit:
        run(*arguments, *([] if "--model" in arguments else ["--model", model]))
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert exit.value.code == 2 and captured.out == ""
    assert len(errors) == 1 and errors[0].startswith("python -m pipelines: error: ") and message in errors[0]
    assert not list(tmp_path.rglob("*.png"))


def test_mistakes_are_answered_before_torch_is_imported(tmp_path):
    script = "import sys\nfrom pipelines.__main__ import main\n"
    script += "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for arguments in (["x", "--model", "nowhere"], [""], ["x", "--scheduler", "y"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "False\n")
        assert len(done.stderr.splitlines()) == 1


def test_default_model_is_beside_the_package_or_here(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "__file__", str(tmp_path / "pipelines" / "__main__.py"))
    assert family.default_model() == Path("models/emoji")
    (tmp_path / "models" / "emoji").mkdir(parents=True)
    assert family.default_model() == tmp_path / "models" / "emoji"


@pytest.mark.parametrize("name", family.SCHEDULERS)
def test_converted_schedulers_keep_the_schedule_and_the_clipping(name):
    """A pixel model's x0 stays in [-1, 1], with the same abar, whichever scheduler takes over."""
    ours = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=True)
    cls = DDPMScheduler if name == "ddpm" else getattr(diffusers, family.SCHEDULERS[name])
    converted = family.convert_scheduler(ours, cls)
    assert type(converted) is cls
    torch.testing.assert_close(converted.alphas_cumprod, ours.alphas_cumprod)
    converted.set_timesteps(5)
    assert int(converted.timesteps[0]) == 999
    torch.manual_seed(0)
    x, eps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    x[0] += 0.1  # so that x0 = (x - eps) / sqrt(abar) is far outside on both sides
    if name == "euler":
        return  # it has no clipping to keep
    if name in ("dpmpp", "unipc"):
        converted._step_index = 0
        x0 = converted.convert_model_output(eps, sample=x)
    else:
        x0 = converted.step(eps, converted.timesteps[0], x).pred_original_sample
    abar = ours.alphas_cumprod[999].item()
    expected = ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).clamp(-1, 1)
    assert (expected.abs() == 1).float().mean() > 0.9
    torch.testing.assert_close(x0, expected, atol=2e-2, rtol=0)


def test_what_stands_beside_is_found_from_within_and_through_a_link(tmp_path, monkeypatch):
    for name in ("mine", "mine-upsampler", "mine-guidance"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path / "models" / "mine")
    for model in (".", tmp_path / "link", "../mine/"):
        for kind in ("upsampler", "guidance"):
            assert family.find_beside(model, kind) == (tmp_path / "models" / f"mine-{kind}").resolve()
    assert family.find_beside("../mine-guidance", "guidance") is None


def test_ddpm_by_name_keeps_all_of_its_noise():
    """Whatever eta the model's own has: x_{t-1} is that of eta = 1."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": True}
    torch.manual_seed(0)
    x, eps = torch.randn(2, 2, 3, 8, 8)
    drawn = []
    for scheduler in (
        family.convert_scheduler(DDPMScheduler(eta=0.4, **settings), DDPMScheduler),
        DDPMScheduler(eta=1.0, **settings),
        DDPMScheduler(eta=0.4, **settings),
    ):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(1)
        drawn.append(scheduler.step(eps, scheduler.timesteps[1], x, generator=generator).prev_sample)
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[1], drawn[2], atol=1e-2)


# ---- flags and files of 0.1

OLD = {
    "--num-images": ("--num-images-per-prompt", 1),
    "--steps": ("--num-inference-steps", 3),
    "--guidance": ("--guidance-scale", 1.5),
    "--clip-guidance": ("--clip-guidance-scale", 2),
    "--classifier-guidance": ("--classifier-guidance-scale", 3),
    "--class": ("--class-labels", "warm"),
    "--best-of": ("--num-candidates", 2),
    "--clip-model": ("--clip-guidance-model", "a name"),
}


@pytest.mark.parametrize("old", OLD)
def test_old_flags_work_with_one_line_that_names_the_new_one(old, capsys):
    """Both are stored as the same; numbers of --clip-guidance alone are the old kind."""
    new, value = OLD[old]

    def parse(*words: str) -> dict:
        return vars(cli.build_parser("draw", "draw").parse_args(["x", *words]))

    before = parse(old, str(value))
    assert capsys.readouterr().err.splitlines() == [f"{old} is now {new}"]
    after = parse(new, str(value))
    assert capsys.readouterr().err == ""
    assert before.pop("flags") != after.pop("flags") and before == after
    assert after[new[2:].replace("-", "_")] == value
    assert parse("--clip-guidance", "clean")["clip_guidance"] == "clean"
    assert capsys.readouterr().err == ""


def test_an_old_flags_error_names_it(model, capsys):
    with pytest.raises(SystemExit):
        run("x", "--model", model, "--steps", 0)
    assert capsys.readouterr().err.splitlines()[-1].endswith("--steps must be a whole number above 0, got 0.")


@pytest.mark.parametrize("name", ["command_line", "page"])
def test_pictures_of_before_are_read_to_the_same_picture(name):
    """Drawn by 0.1 with models/emoji: its settings, read by today's names, draw it again."""
    path = ROOT / "tests" / "data" / "before" / f"{name}.png"
    with pytest.warns(FutureWarning, match="num_inference_steps") as told:
        settings = png.read_settings(path)
    assert len(told) == 1
    call = {}
    for key in settings.keys() & ARGUMENTS.keys() - {"width", "height", "prompt"}:
        kind = ARGUMENTS[key].metadata["kind"]
        call[key] = json.loads(settings[key]) if kind in (dict, tuple) else kind(settings[key])
    pipe = family.load_model(family.default_model())
    assert family.load_guides(pipe, family.default_model())
    generator = torch.Generator().manual_seed(int(settings["seed"]))
    (again,) = pipe(settings["prompt"], generator=generator, **call).images
    assert np.abs(np.array(again).astype(int) - np.array(Image.open(path))).max() <= 1
    call |= {"num_inference_steps": 3}
    other = pipe(settings["prompt"], generator=generator, **call).images[0]
    assert np.abs(np.array(other).astype(int) - np.array(Image.open(path))).max() > 8


def test_settings_that_are_the_default_are_not_written():
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "num_candidates": 1, "clip_guidance_scale": 0.0}
    assert png.settings_of(call) == {"num_inference_steps": "4", "guidance_scale": "2.0"}
    call = {"combined_prompts": {'a "crown"': -0.5}, "guidance_interval": (0, float("inf")), "noise_level": 0}
    written = png.settings_of(call)
    assert json.loads(written["combined_prompts"]) == {'a "crown"': -0.5}
    assert json.loads(written["guidance_interval"]) == [0, float("inf")] and written["noise_level"] == "0"


# ---- the commands


def test_every_argument_with_a_kind_is_a_flag():
    for command, task in (("draw", TEXT), ("edit", IMAGE), ("enlarge", "super_resolution")):
        told = cli.build_parser(command, command).format_help()
        for name, one in ARGUMENTS.items():
            if one.metadata["kind"] and task in one.metadata["only"]:
                assert re.search(rf"^  --{name.replace('_', '-')} ", told, re.MULTILINE), (command, name)


def test_several_prompts_and_arguments_of_two_values(model, tmp_path, capsys):
    options = ["--guidance-interval", 0.5, 9, "--combined-prompts", '{"a hat": 0.5}']
    call = ["--model", model, "--out", tmp_path, "--seed", 4, *options]
    assert run("draw", "an owl", "a fox", *call) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()[:2]]
    for prompt, path in zip(("an owl", "a fox"), paths, strict=True):
        expected = draw(model, prompt, 4, guidance_interval=(0.5, 9), combined_prompts={"a hat": 0.5})
        picture = Image.open(path)
        assert (np.array(picture) == expected).all()
        assert json.loads(picture.text["guidance_interval"]) == [0.5, 9]


def test_edit_restyles_repaints_and_extends(model, tmp_path, capsys):
    from pipelines import ImageToImagePipeline, InpaintPipeline

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    white = np.zeros((16, 16), np.uint8)
    white[4:9, 2:12] = 255
    picture, mask = Image.fromarray(pixels), Image.fromarray(white)
    picture.save(tmp_path / "given.png")
    mask.save(tmp_path / "mask.png")
    call = [
        "edit",
        tmp_path / "given.png",
        "an owl",
        "--model",
        model,
        "--seed",
        5,
        "--out",
        tmp_path / "out",
    ]

    def edited(*options):
        assert run(*call, *options) == 0
        return Image.open(capsys.readouterr().out.splitlines()[0])

    def generator():
        return torch.Generator().manual_seed(5)

    redraw, paint = (cls.from_pretrained(model) for cls in (ImageToImagePipeline, InpaintPipeline))
    expected = redraw("an owl", image=picture, strength=0.5, generator=generator()).images[0]
    result = edited("--strength", 0.5)
    assert (np.array(result) == np.array(expected)).all() and result.text["strength"] == "0.5"
    expected = paint("an owl", image=picture, mask_image=mask, generator=generator()).images[0]
    result = edited("--mask", tmp_path / "mask.png")
    assert (np.array(result) == np.array(expected)).all() and result.text["task"] == "repaint"
    assert (np.array(result)[white == 0] == pixels[white == 0]).all()
    expected = paint.outpaint("an owl", picture, left=3, bottom=5, generator=generator()).images[0]
    result = edited("--left", 3, "--bottom", 5)
    assert result.size == (19, 21) and (np.array(result) == np.array(expected)).all()
    for options, message in (
        (["--jump-n-sample", 2], "--jump-n-sample does not go with this kind of edit"),
        (["--mask", tmp_path / "none.png"], "there is no file"),
        (["--mask", tmp_path / "mask.png", "--left", 2], "two kinds of edit"),
        (["--left", -2], "--left must be 0 or more, got -2"),
    ):
        with pytest.raises(SystemExit) as exit:
            run(*call, *options)
        said = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and len(said) == 1 and message in said[0], said


def test_enlarge(make_upsampler, tmp_path, capsys):
    make_upsampler().save_pretrained(tmp_path / "up")
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    given.save(tmp_path / "given.png")
    call = ["enlarge", tmp_path / "given.png", "--upsampler", tmp_path / "up", "--seed", 2]
    assert run(*call, "--out", tmp_path, "--noise-level", 0, "--num-inference-steps", 2) == 0
    result = Image.open(capsys.readouterr().out.splitlines()[0])
    pipe = SuperResolutionPipeline.from_pretrained(tmp_path / "up")
    options = {"noise_level": 0, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(2)}
    assert (np.array(result) == np.array(pipe(image=given, **options).images[0])).all()
    assert (result.text["noise_level"], result.text["task"]) == ("0", "enlarge")


def test_classify_prints_softmax_of_the_judge(capsys):
    from pipelines.components.guidance_clip import GuidanceCLIP

    path = ROOT / "tests" / "data" / "emoji64" / "dog-face-noto.png"
    assert run("classify", path, "--labels", "a car, dog face", "--template", "{} emoji") == 0
    said = capsys.readouterr().out
    clip = GuidanceCLIP.load(ROOT / "models" / "judge")
    small = png.open_picture(path).resize((clip.image_size,) * 2, Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1
    cosines = clip.embed_images(x) @ clip.embed_texts(["a car emoji", "dog face emoji"]).T
    car, dog = (clip.model.logit_scale.exp() * cosines).softmax(-1)[0].tolist()
    assert said == f"{path}: dog face {dog:.1%}, a car {car:.1%}\n"


def test_train_passes_on_its_flags_and_its_exit_status(model, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        run("train", tmp_path, "--model", model, "--no-such-setting", 3)
    assert exit.value.code not in (0, None) and "no-such-setting" in capfd.readouterr().err


def test_models_lists_what_is_there(capsys):
    assert run("models") == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    beside = "beside it emoji-upsampler and emoji-guidance"
    assert lines["emoji"].startswith("TextToImagePipeline, 64 pixels, ") and lines["emoji"].endswith(beside)
    assert lines["judge"].startswith("CLIPModel, ")
    assert lines["style-classifier"].startswith("NoisyClassifier, ")


def test_the_first_word_is_a_command_or_a_prompt(capsys):
    assert run("--help") == 0
    told = capsys.readouterr().out
    assert all(f"\n  {command} " in told for command in cli.COMMANDS)
    with pytest.raises(SystemExit) as exit:
        run("draw", "--help")
    assert exit.value.code == 0 and "usage: python -m pipelines draw" in capsys.readouterr().out
    for words in (["--seed", 3, "edit this"], ["--", "edit"]):  # options first; a prompt named as a command
        with pytest.raises(SystemExit):
            run("--model", "nowhere", *words)
        assert "no model folder nowhere" in capsys.readouterr().err
