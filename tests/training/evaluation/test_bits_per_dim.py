"""bits-per-dim, text-information and sampling-steps: tiny models against sums written out here."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import mpmath
import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.drawing.text import encode_text
from training import evaluate
from training.data.pictures import seed_for
from training.evaluation.bits_per_dim import BitsPerDimConfig, picture_noise, shuffle_captions
from training.evaluation.judge import Judge
from training.evaluation.metrics import frechet_distance
from training.evaluation.sampling_steps import SamplingStepsConfig, label
from training.run.settings import parse_config

T = 12
SEED = 3


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    """9 training and 7 validation pictures of 16 x 16 random levels; the first caption is also the last's."""
    generator = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})

    def rows(count: int) -> list[dict]:
        pixels = generator.integers(-60, 316, (count, 16, 16, 3)).clip(0, 255).astype(np.uint8)
        captions = [f"thing {i}" for i in range(count - 1)] + ["thing 0"]
        return [{"image": Image.fromarray(p), "caption": c} for p, c in zip(pixels, captions, strict=True)]

    parts = {
        split: datasets.Dataset.from_list(rows(count), features=features)
        for split, count in (("train", 9), ("validation", 7))
    }
    folder = tmp_path_factory.mktemp("pictures")
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def make_model(tmp_path_factory, tokenizer, make_text_encoder, make_unet) -> Any:
    """make_model(scheduler settings, **unet settings): a saved pipeline of T timesteps, its folder."""

    def make(scheduler: dict[str, Any], **unet: Any) -> Path:
        settings = {
            "num_train_timesteps": T,
            "beta_schedule": "squaredcos_cap_v2",
            "timestep_spacing": "trailing",
        }
        pipe = TextToImagePipeline(
            tokenizer, make_text_encoder(), make_unet(**unet), DDPMScheduler(**(settings | scheduler))
        )
        folder = tmp_path_factory.mktemp("model")
        pipe.save_pretrained(folder)
        return folder

    return make


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def level_bits(x: float, mean: float, sigma: float) -> float:
    """-log2 of a Gaussian's mass in the bin of level x, to 30 digits: the mean may be 300 deviations away."""
    with mpmath.workdps(30):
        low = -mpmath.inf if x < -0.999 else (x - mpmath.mpf(1) / 255 - mean) / (sigma * mpmath.sqrt(2))
        high = mpmath.inf if x > 0.999 else (x + mpmath.mpf(1) / 255 - mean) / (sigma * mpmath.sqrt(2))
        if low < 0:
            low, high = -high, -low  # the side where erfc keeps its digits
        return float(-mpmath.log((mpmath.erfc(low) - mpmath.erfc(high)) / 2, 2))


def bits_by_hand(
    folder: Path,
    data: Path,
    number: int,
    caption: str,
    variance: str | None = None,
    visited: list[int] | None = None,
) -> list[float]:
    """Every term of validation picture `number` in bits per dimension, L_0 first and L_T last: Ho 2020's
    equations in float64, the picture alone in its batch."""
    pipe = TextToImagePipeline.from_pretrained(folder)
    config = pipe.scheduler.config
    variance, visited = variance or config.variance_type, visited or list(range(T))
    row = datasets.load_from_disk(str(data))["validation"][number]
    x0 = torch.tensor(np.asarray(row["image"]).astype(np.float64) / 127.5 - 1).permute(2, 0, 1)
    abars = pipe.scheduler.alphas_cumprod.double().tolist()
    with torch.no_grad():
        states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, [caption])

    def sigma2(small: float, large: float, v: torch.Tensor) -> torch.Tensor:
        f = {"fixed_small": 0 * v, "fixed_large": 0 * v + 1, "learned_range": (v + 1) / 2}[variance]
        return (f * math.log(large) + (1 - f) * math.log(small)).exp()

    terms = []
    for place, t in enumerate(visited):
        a, b = abars[t], abars[visited[place - 1]] if place else 1.0
        generator = torch.Generator().manual_seed(seed_for(SEED, "bits per dimension", number, t))
        x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * torch.randn(3, 16, 16, generator=generator).double()
        added = {"pooled_text": pooled} if pipe.unet.config.pooled_text_time_embedding else None
        with torch.no_grad():
            output = pipe.unet(x_t.float()[None], t, states, added_cond_kwargs=added).sample[0].double()
        v = output[3:] if len(output) == 6 else torch.zeros_like(x0)
        guess = {
            "sample": output[:3],
            "epsilon": (x_t - math.sqrt(1 - a) * output[:3]) / math.sqrt(a),
            "v_prediction": math.sqrt(a) * x_t - math.sqrt(1 - a) * output[:3],
        }[config.prediction_type].clamp(-1, 1)
        beta = 1 - a / b
        if place == 0:
            after = abars[visited[1]]
            small = (1 - a) / (1 - after) * (1 - after / a)  # beta~ of the step before
            sigma = sigma2(small, beta, v).sqrt()
            each = zip(*(x.flatten().tolist() for x in (x0, guess, sigma)), strict=True)
            terms.append(sum(level_bits(*values) for values in each) / x0.numel())
        else:

            def mean(
                x: torch.Tensor, x_t: Any = x_t, a: float = a, b: float = b, beta: float = beta
            ) -> torch.Tensor:
                return (math.sqrt(b) * beta * x + math.sqrt(1 - beta) * (1 - b) * x_t) / (1 - a)

            small = (1 - b) / (1 - a) * beta
            q = Normal(mean(x0), torch.full_like(x0, small).sqrt())
            terms.append(
                kl_divergence(q, Normal(mean(guess), sigma2(small, beta, v).sqrt())).mean() / math.log(2)
            )
    a = abars[visited[-1]]
    q = Normal(math.sqrt(a) * x0, torch.full_like(x0, 1 - a).sqrt())
    terms.append(kl_divergence(q, Normal(torch.zeros_like(x0), torch.ones_like(x0))).mean() / math.log(2))
    return [float(term) for term in terms]


def chosen(count: int) -> list[int]:
    return torch.randperm(7, generator=torch.Generator().manual_seed(SEED)).tolist()[:count]


def caption_of(data: Path, number: int) -> str:
    return datasets.load_from_disk(str(data))["validation"][number]["caption"]


def mean_and_error(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {
        "mean": pytest.approx(mean, rel=2e-4),
        "standard error": pytest.approx(spread / math.sqrt(len(values)), rel=5e-3),
    }


MODELS = [
    ({"prediction_type": "epsilon", "clip_sample": False}, {}),
    ({"prediction_type": "sample"}, {"pooled_text_time_embedding": True, "pooled_text_dim": 24}),
    (
        {"prediction_type": "v_prediction", "variance_type": "learned_range"},
        {"out_channels": 6, "patch_size": 2},
    ),
]


@pytest.mark.parametrize("scheduler, unet", MODELS)
def test_bits_per_dim_by_hand(scheduler, unet, make_model, dataset_folder, tmp_path, monkeypatch, capsys):
    """Every term, its mean and error over 5 pictures in batches of 2; x0 clipped whatever the config says."""
    folder = make_model(scheduler, **unet)
    command(
        monkeypatch, "bits-per-dim", "--model", folder, "--dataset", dataset_folder, "--num_pictures", 5,
        "--batch_size", 2, "--seed", SEED, "--cache_dir", tmp_path, "--json", tmp_path / "bits.json",
        "--output", tmp_path / "deep" / "terms.png",
    )  # fmt: skip
    figures = json.loads((tmp_path / "bits.json").read_text())
    rows = [bits_by_hand(folder, dataset_folder, i, caption_of(dataset_folder, i)) for i in chosen(5)]
    columns = list(zip(*rows, strict=True))
    assert figures["pictures"] == 5 and figures["timesteps"] == list(range(T))
    assert figures["bits/dim"] == mean_and_error([sum(row) for row in rows])
    assert figures["L_0 (the last step, to 256 levels)"] == mean_and_error(list(columns[0]))
    assert figures[f"L_1 .. L_{T - 1} (the steps between)"] == mean_and_error(
        [sum(row[1:-1]) for row in rows]
    )
    assert figures["L_T (the prior)"] == mean_and_error(list(columns[-1]))
    assert figures["terms"] == [mean_and_error(list(column))["mean"] for column in columns]
    assert figures["standard errors of the terms"] == [
        mean_and_error(list(column))["standard error"] for column in columns
    ]
    printed = capsys.readouterr().out
    assert f"mean: {figures['bits/dim']['mean']:.3f}" in printed
    assert f"variance: {scheduler.get('variance_type', 'fixed_small')}" in printed
    assert Image.open(tmp_path / "deep" / "terms.png").format == "PNG"


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fewer_steps_and_another_variance(variance, make_model, dataset_folder, tmp_path, monkeypatch):
    """4 of 12 timesteps, both ends among them; the fixed variances of a U-Net that tells its own."""
    folder = make_model(*(dict(part) for part in MODELS[2][:1]), **MODELS[2][1])
    command(
        monkeypatch, "bits-per-dim", "--model", folder, "--dataset", dataset_folder, "--num_pictures", 3,
        "--seed", SEED, "--cache_dir", tmp_path, "--json", tmp_path / "bits.json",
        "--num_inference_steps", 4, "--variance_type", variance,
    )  # fmt: skip
    figures = json.loads((tmp_path / "bits.json").read_text())
    visited = [0, 4, 7, 11]
    rows = [
        bits_by_hand(folder, dataset_folder, i, caption_of(dataset_folder, i), variance, visited)
        for i in chosen(3)
    ]
    assert figures["timesteps"] == visited and figures["variance"] == variance
    assert figures["bits/dim"] == mean_and_error([sum(row) for row in rows])


def test_text_information_by_hand(make_model, dataset_folder, tmp_path, monkeypatch):
    """Own, null and shuffled captions on the same noise; differences are paired, in bits a picture."""
    folder = make_model(*(dict(part) for part in MODELS[1][:1]), **MODELS[1][1])
    command(
        monkeypatch, "text-information", "--model", folder, "--dataset", dataset_folder, "--num_pictures", 5,
        "--batch_size", 3, "--seed", SEED, "--cache_dir", tmp_path, "--json", tmp_path / "bits.json",
        "--output", tmp_path / "caption.png",
    )  # fmt: skip
    figures = json.loads((tmp_path / "bits.json").read_text())
    numbers = chosen(5)
    captions = [caption_of(dataset_folder, i) for i in numbers]
    texts = {"conditional": captions, "unconditional": [""] * 5, "shuffled": shuffle_captions(captions)}
    rows = {
        name: [bits_by_hand(folder, dataset_folder, i, c) for i, c in zip(numbers, given, strict=True)]
        for name, given in texts.items()
    }
    for name, of_pictures in rows.items():
        assert figures[f"{name}, bits/dim"] == mean_and_error([sum(row) for row in of_pictures])
    for name in ("unconditional", "shuffled"):
        saved = [
            [768 * (a - b) for a, b in zip(other, own, strict=True)]
            for other, own in zip(rows[name], rows["conditional"], strict=True)
        ]
        found = figures[f"{name} - conditional, bits a picture"]
        expected = mean_and_error([sum(row) for row in saved])
        assert found["mean"] == pytest.approx(expected["mean"].expected, abs=0.02, rel=2e-3)
        assert found["standard error"] == pytest.approx(
            expected["standard error"].expected, abs=0.02, rel=1e-2
        )
        means = [sum(column) / 5 for column in zip(*saved, strict=True)]
        assert figures[f"{name} - conditional, bits a picture, term by term"] == pytest.approx(
            means, abs=0.02
        )
        assert abs(found["mean"]) > 1 and means[-1] == 0  # the caption counts; the prior knows none
    assert figures["captions that the shuffle left"] == 0
    assert Image.open(tmp_path / "caption.png").format == "PNG"


def test_a_model_that_ignores_its_text_has_no_information(make_model, dataset_folder, tmp_path, monkeypatch):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    folder = make_model({}, **blocks, mid_block_type="UNetMidBlock2D")
    command(
        monkeypatch, "text-information", "--model", folder, "--dataset", dataset_folder, "--num_pictures", 3,
        "--cache_dir", tmp_path, "--json", tmp_path / "bits.json",
    )  # fmt: skip
    figures = json.loads((tmp_path / "bits.json").read_text())
    for name in ("unconditional", "shuffled"):
        assert figures[f"{name} - conditional, bits a picture"] == {"mean": 0, "standard error": 0}


def test_noise_depends_on_seed_picture_and_timestep_alone():
    together = picture_noise(5, [3, 8], (2, 2))(40)
    assert torch.equal(picture_noise(5, [8], (2, 2))(40)[0], together[1])
    for other in (picture_noise(6, [8], (2, 2))(40), picture_noise(5, [8], (2, 2))(41), together[:1]):
        assert not torch.equal(other[0], together[1])
    many = picture_noise(0, list(range(2000)), (5,))(0)
    assert abs(many.mean()) < 0.04 and abs(many.var() - 1) < 0.06  # four standard errors of 10,000


def test_shuffled_captions():
    """Everyone else's, each used once; where captions repeat, the shift that leaves the fewest in place."""
    assert shuffle_captions(["a", "b", "c"]) == ["b", "c", "a"]
    assert shuffle_captions(["a", "a", "b", "b"]) == ["b", "b", "a", "a"]
    assert shuffle_captions(["a", "a"]) == ["a", "a"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--num_pictures", "1"), "num_pictures must be at least 2, for a standard error, got 1"),
        (("--batch_size", "0"), "batch_size must be at least 1, got 0"),
        (("--num_inference_steps", "0"), "num_inference_steps must be at least 1, or none, got 0"),
        (("--num_inference_steps", "13"), "num_inference_steps=13: must be an integer in 1 .. 12"),
        (("--variance_type", "small"), "variance_type must be one of"),
        (("--variance_type", "learned"), "variance_type must be one of"),
        (("--model", "{tmp}"), "is no model folder"),
        (("--model", "{latent}"), "a pipeline without a VAE"),
        (("--split", "test"), "has no split 'test'; it has"),
    ],
)
def test_errors_are_one_clear_line(
    arguments, message, make_model, stable_diffusion_folder, dataset_folder, tmp_path, monkeypatch
):
    arguments = [a.format(tmp=tmp_path, latent=stable_diffusion_folder) for a in arguments]
    folder = make_model({})
    for name in ("bits-per-dim", "text-information"):
        with pytest.raises(SystemExit) as stopped:
            command(
                monkeypatch, name, "--model", folder, "--dataset", dataset_folder,
                "--cache_dir", tmp_path / "cache", *arguments,
            )  # fmt: skip
        assert message in str(stopped.value) and "\n" not in str(stopped.value)
        assert str(stopped.value).startswith(f"training.evaluate {name}: ")


# ------------------------------------------------------------ against the number of steps


def test_frechet_distance_in_closed_form():
    """Features whose sample moments are exact: |mu|^2 and, for diagonal covariances, sum (s_a - s_b)^2; then
    the square root of a product that is not symmetric, by eigenvalues of C_a C_b."""
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0, covariance I
    a = white * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])
    b = white * torch.tensor([3.0, 2.0, 1.5])
    assert frechet_distance(a, b) == pytest.approx(5 + 4 + 0 + 1, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    left, right = (torch.randn(3, 3, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    product = torch.linalg.eigvals(left @ left.T @ right @ right.T).real.sqrt().sum()
    expected = (left @ left.T).trace() + (right @ right.T).trace() - 2 * product
    assert frechet_distance(white @ left.T, white @ right.T) == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory, tokenizer) -> Path:
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = tokenizer.eos_token_id
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=8, eos_token_id=end, **sizes
    )
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **sizes)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sampling_steps(make_model, judge_folder, dataset_folder, tmp_path, monkeypatch):
    """Bits as bits-per-dim counts them; distances of pictures drawn here again, one by one."""
    learned = make_model(*(dict(part) for part in MODELS[2][:1]), **MODELS[2][1])
    names = [f"{learned}:fixed_large", str(learned)]
    shared = ["--dataset", dataset_folder, "--seed", SEED, "--cache_dir", tmp_path, "--num_pictures", 3]
    command(
        monkeypatch, "sampling-steps", "--models", *names, "--steps", 2, 5, "--judge", judge_folder,
        "--num_drawn", 1000, "--batch_size", 3, *shared, "--json", tmp_path / "steps.json",
        "--output", tmp_path / "steps.png",
    )  # fmt: skip
    figures = json.loads((tmp_path / "steps.json").read_text())

    order = torch.randperm(9, generator=torch.Generator().manual_seed(SEED)).tolist()
    train = datasets.load_from_disk(str(dataset_folder))["train"]
    judge = Judge(str(judge_folder))

    def features(images: torch.Tensor) -> torch.Tensor:
        return judge.embed_images(torch.nn.functional.avg_pool2d(images, 2))

    real = torch.stack([torch.tensor(np.asarray(row["image"])).permute(2, 0, 1) / 127.5 - 1 for row in train])
    reference = features(real[order[:4]])
    captions = [train[i]["caption"] for i in order[4:8]]
    for name, variance in zip(names, ("fixed_large", "learned_range"), strict=True):
        assert figures[name]["drawn"] == 4
        floor = frechet_distance(features(real[order[4:8]]), reference)
        assert figures[name]["floor of the Frechet distance"] == pytest.approx(floor, rel=1e-4)
        for steps in (2, 5):
            command(
                monkeypatch, "bits-per-dim", "--model", learned, "--variance_type", variance,
                "--num_inference_steps", steps, *shared, "--json", tmp_path / "bits.json",
            )  # fmt: skip
            bits = json.loads((tmp_path / "bits.json").read_text())["bits/dim"]
            assert figures[name][f"{steps} steps"]["bits/dim"] == pytest.approx(bits, rel=1e-4)
            pipe = TextToImagePipeline.from_pretrained(learned)
            config = {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}
            pipe.scheduler = DDPMScheduler(**(config | {"variance_type": variance}))
            drawn = [
                pipe(
                    caption, num_inference_steps=steps, guidance_scale=1.0, output_type="pt",
                    generator=torch.Generator().manual_seed(SEED + i),
                ).images
                for i, caption in enumerate(captions)
            ]  # fmt: skip
            distance = frechet_distance(features(torch.cat(drawn) * 2 - 1), reference)
            assert figures[name][f"{steps} steps"]["Frechet distance"] == pytest.approx(distance, rel=1e-3)
    assert Image.open(tmp_path / "steps.png").format == "PNG"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"models": []}, "models must be at least one pipeline"),
        ({"models": ["a:small"]}, "models must be FOLDER:VARIANCE_TYPE, one of .* got 'a:small'"),
        ({"steps": [10, 0]}, r"steps must be numbers of 1 or more, got \[10, 0\]"),
        ({"num_drawn": 1}, "num_drawn must be at least 2, got 1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be 0 or more, got -1.0"),
    ],
)
def test_settings_of_sampling_steps_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingStepsConfig(**settings).check()


def test_legends_name_models_without_their_paths():
    names = {
        "runs/simple/pipeline:fixed_large": "simple, fixed_large",
        "models/emoji": "emoji",
        "pipeline": "pipeline",
    }
    assert {model: label(model) for model in names} == names


@pytest.mark.parametrize("config", [BitsPerDimConfig, SamplingStepsConfig])
def test_every_setting_has_its_help(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for name, setting in config.__dataclass_fields__.items():
        assert f"--{name}" in shown and setting.metadata["help"][:12] in shown


def test_the_defaults_pass():
    SamplingStepsConfig().check()
    BitsPerDimConfig().check()
