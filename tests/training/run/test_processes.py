"""Whole trainings as processes of their own: killed and resumed, alone and two together, on shared caches."""

import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from forks import ROOT, Forks
from PIL import Image
from safetensors.torch import load_file
from tars import write_tars


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


CONFIGS = ROOT / "training" / "configs" / "accelerate"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer, make_text_encoder) -> dict[str, Any]:
    """A tiny CLIP, and random pictures of 16 x 16, ten to train on, each with three captions."""
    folder = tmp_path_factory.mktemp("sources")
    make_text_encoder().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    rows = []
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        captions = [f"{kind} {number}" for kind in ("cat", "dog", "house")]
        row = {"image": {"bytes": file.getvalue(), "path": None}, "caption": captions[0]}
        rows.append(row | {"captions": captions, "concept": f"concept {number // 3}"})
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"),
        captions=datasets.List(datasets.Value("string")), concept=datasets.Value("string"),
    )  # fmt: skip
    parts = {"train": rows[:10], "validation": rows[10:]}
    made = {name: datasets.Dataset.from_list(part, features=features) for name, part in parts.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder / "data"))
    unet = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "patch_size": 2, "layers_per_block": 1}
    unet |= {"block_out_channels": [16, 32], "attention_head_dim": 4, "norm_num_groups": 8}
    unet |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 32}
    unet |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    return {
        "text_encoder": str(folder / "clip"),
        "dataset_name": str(folder / "data"),
        "cache_dir": str(folder / "cache"),
        "unet": unet,
        "prediction_type": "v_prediction",
        "random_flip": True,
        "caption_dropout": 0.3,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3,
        "ema_decay": 0.9,
        "report_to": "none",
    }


def job(folder: Path, sources: Any, env: dict[str, str] | None = None, stop: int = 0, **settings: Any) -> Any:
    """A training with everything in `folder`, over after step `stop`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(sources | {"output_dir": str(folder / "run")} | settings)
    path = folder / f"config-{len(list(folder.glob('config-*')))}.yaml"
    path.write_text(text)
    losses = str(folder / f"losses-{(env or {}).get('RANK', '0')}.jsonl")
    return {"call": "train", "args": [losses, stop, "--config", str(path)], "env": env or {}}


def steps_of(folder: Path, rank: int = 0) -> list[list[float]]:
    """[step, loss, learning rate] as they were recorded, repeated steps too."""
    path = folder / f"losses-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def weights(folder: Path, step: int, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / f"checkpoint-{step}" / part / "diffusion_pytorch_model.safetensors")


def pair(port: int) -> list[dict[str, str]]:
    """What torch's launcher tells two processes of one machine."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finished(results: list[tuple[int, float, str]]) -> list[float]:
    for code, _, output in results:
        assert code == 0, output
    return [seconds for _, seconds, _ in results]


def test_killed_at_random_moments_and_resumed_it_ends_the_same(forks, sources, tmp_path):
    """SIGKILL six times at random moments, once before training begins and once before there is a checkpoint:
    every step's loss and rate, the weights, their average and AdamW's moments are those of the run that was
    left alone, bit for bit."""
    steps, settings = 30, {"train_batch_size": 3, "gradient_accumulation_steps": 2, "checkpointing_steps": 2}
    settings |= {"max_train_steps": steps, "unet": sources["unet"] | {"dropout": 0.2}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(forks.run(job(whole, sources, **settings)))
    lines = steps_of(whole)
    step_time = (lines[-1][3] - lines[0][3]) / (steps - 1)

    chance, kills, starts = random.Random(), 0, []
    waits = [1, chance.randint(4, 6), 0, *(chance.randint(1, 4) for _ in range(3))]  # steps before each kill
    settings["resume_from_checkpoint"] = "latest"
    while kills < 6:
        before = len(steps_of(parts))
        one = job(parts, sources, **settings)
        one["kill"] = {"seconds": chance.uniform(0, 2 if waits[kills] > 1 else 0.9) * step_time}
        if waits[kills]:
            one["kill"] |= {"file": one["args"][0], "lines": waits[kills]}
        ((code, _, output),) = forks.run(one)
        if code == 0:
            break
        assert code == -9, output
        kills += 1
        starts += [line[0] for line in steps_of(parts)[before : before + 1]]
    finished(forks.run(job(parts, sources, **settings)))
    assert kills >= 5 and sum(start > 1 for start in starts) >= 2, (kills, starts)

    expected = {line[0]: line[:3] for line in lines}
    assert [line[:3] for line in steps_of(parts)] == [expected[line[0]] for line in steps_of(parts)]
    assert {line[0] for line in steps_of(parts)} == set(range(1, steps + 1))
    for part in ("unet", "unet_ema"):
        assert_same(weights(parts, steps, part), weights(whole, steps, part))
    first, second = (
        torch.load(folder / "run" / f"checkpoint-{steps}" / "optimizer.bin", weights_only=True)
        for folder in (whole, parts)
    )
    assert_same(first, second)
    names = sorted(path.name for path in (parts / "run").iterdir())
    assert names == [
        f"checkpoint-{steps - 2}",
        f"checkpoint-{steps}",
        "pipeline",
    ]  # nothing half done is left


def test_two_processes_have_the_losses_of_one(forks, sources, port, tmp_path):
    """Twenty steps of the same global batches, half in each process; only the first process writes."""
    settings = {"max_train_steps": 20, "gradient_accumulation_steps": 2, "checkpointing_steps": 10}
    finished(forks.run(job(tmp_path / "one", sources, train_batch_size=6, **settings)))
    half = {"train_batch_size": 3, "num_processes": 2}
    finished(forks.run(*(job(tmp_path / "two", sources, env, **settings, **half) for env in pair(port))))
    one, two, other = (
        np.array(steps_of(tmp_path / name, rank)) for name, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    np.testing.assert_array_equal(two[:, :3], other[:, :3])  # both know the mean of the whole batch
    assert np.abs(one[:, 1] - two[:, 1]).max() < 1e-5
    np.testing.assert_array_equal(one[:, [0, 2]], two[:, [0, 2]])  # steps and learning rates
    for part in ("unet", "unet_ema"):
        both, alone = weights(tmp_path / "two", 20, part), weights(tmp_path / "one", 20, part)
        for name in alone:
            assert (both[name] - alone[name]).abs().mean() < 5e-5, name  # steps are of 1e-3
    written = [
        {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name / "run").rglob("*")}
        for name in ("one", "two")
    ]
    own = {f"run/checkpoint-{step}/random_states_1.pkl" for step in (10, 20)}  # accelerate's, for itself
    assert written[1] == written[0] | own


def test_one_process_goes_on_in_two_and_back(forks, sources, port, tmp_path):
    """Whichever number of processes wrote a checkpoint, any other goes on from it: same batches and rates."""
    settings = {"gradient_accumulation_steps": 2, "max_train_steps": 12}
    finished(forks.run(job(tmp_path / "whole", sources, train_batch_size=6, **settings)))
    settings |= {"resume_from_checkpoint": "latest", "checkpointing_steps": 4}
    turns = tmp_path / "turns"
    for stop, environments in ((4, [None]), (8, pair(port)), (12, [None])):
        settings["train_batch_size"] = 6 // len(environments)
        finished(forks.run(*(job(turns, sources, env, stop, **settings) for env in environments)))
    whole, parts = (np.array(steps_of(folder)) for folder in (tmp_path / "whole", turns))
    np.testing.assert_array_equal(parts[:, [0, 2]], whole[:, [0, 2]])
    assert np.abs(parts[:, 1] - whole[:, 1]).max() < 1e-5
    assert len(steps_of(turns, 1)) == 4


def test_a_streamed_training_resumes_and_is_shared(forks, sources, port, tmp_path):
    """From webdataset tars: stopped after four of eight steps and resumed, alone bit for bit, and in two."""
    tars = write_tars(tmp_path / "tars", [range(7), range(7, 12), range(12, 23)])
    changes = {"dataset_name": None, "train_data_dir": str(tars), "streaming": True, "shuffle_buffer": 5}
    settings = sources | changes | {"train_batch_size": 6, "max_train_steps": 8, "checkpointing_steps": 4}
    whole, parts, shared = (tmp_path / name for name in ("whole", "parts", "shared"))
    finished(forks.run(job(whole, settings), job(parts, settings, stop=4), job(shared, settings, stop=4)))
    settings["resume_from_checkpoint"] = "latest"
    finished(forks.run(job(parts, settings)))
    assert [line[:3] for line in steps_of(parts)] == [line[:3] for line in steps_of(whole)]
    assert_same(weights(parts, 8), weights(whole, 8))
    finished(forks.run(*(job(shared, settings | {"train_batch_size": 3}, env) for env in pair(port))))
    one, two = (np.array(steps_of(folder)) for folder in (whole, shared))
    assert one.shape == two.shape and np.abs(one[:, 1] - two[:, 1]).max() < 1e-5
    cached = settings | {"streaming": False}  # a checkpoint without a place in a stream, and the reverse
    finished(forks.run(job(tmp_path / "cached", cached, stop=4)))
    ((code, _, output),) = forks.run(job(tmp_path / "cached", settings))
    assert code and "streaming must be off, as it was before this checkpoint" in output


def test_adapters_of_two_models_in_two_processes(forks, sources, port, tmp_path):
    """U-Net and text encoder, each behind a wrapper that averages gradients: the losses of one process."""
    (tmp_path / "start").mkdir()
    finished(forks.run(job(tmp_path / "start", sources, max_train_steps=1)))
    changes = dict.fromkeys(("unet", "text_encoder", "prediction_type"))
    changes |= {"pretrained_model_name_or_path": str(tmp_path / "start" / "run" / "pipeline")}
    settings = sources | changes | {"rank": 2, "train_text_encoder": True, "max_train_steps": 6}
    settings |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "validation_steps": 3}
    finished(forks.run(job(tmp_path / "one", settings, train_batch_size=6)))
    finished(forks.run(*(job(tmp_path / "two", settings, env, train_batch_size=3) for env in pair(port))))
    one, two = (np.array(steps_of(tmp_path / name)) for name in ("one", "two"))
    assert np.abs(one[:, 1] - two[:, 1]).max() < 1e-5
    file = "pytorch_lora_weights.safetensors"
    alone, both = (load_file(tmp_path / name / "run" / file) for name in ("one", "two"))
    assert any(name.startswith("text_encoder") for name in alone)
    for name in alone:
        assert (alone[name] - both[name]).abs().mean() < 1e-3, name  # six steps of 1e-2


@pytest.mark.slow
def test_one_of_two_killed_ends_both_and_both_resume(forks, sources, port, tmp_path):
    """The other does not wait for ever; resumed, they end as if nothing had been."""
    settings = {"train_batch_size": 3, "max_train_steps": 30, "checkpointing_steps": 2}
    settings["resume_from_checkpoint"] = "latest"
    finished(forks.run(*(job(tmp_path / "whole", sources, env, **settings) for env in pair(port))))
    first, second = (job(tmp_path / "parts", sources, env, **settings) for env in pair(port))
    second["kill"] = {"file": second["args"][0], "seconds": 0.5}
    (killed, _, _), (other, _, output) = forks.run(second, first)
    assert killed == -9 and other > 0, output
    finished(forks.run(*(job(tmp_path / "parts", sources, env, **settings) for env in pair(port))))
    assert_same(weights(tmp_path / "parts", 30), weights(tmp_path / "whole", 30))


def test_two_that_start_together_fill_a_cache_once(forks, tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    one = {"call": "fill_cache", "args": [str(tmp_path / "cache" / "rows.npy"), str(log)]}
    finished(forks.run(one, one, one))
    assert len(log.read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["rows.npy"]


def test_a_filler_that_is_killed_leaves_the_cache_to_the_next(forks, tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    one = {"call": "fill_cache", "args": [str(tmp_path / "cache" / "rows.npy"), str(log)]}
    killed = one | {"kill": {"seconds": 0.2, "file": str(log)}}
    ((code, _, _),) = forks.run(killed)
    left = sorted(path.name.split(".")[-1] for path in (tmp_path / "cache").iterdir())
    assert (code, left) == (-9, ["lock", "partial"])
    finished(forks.run(one, one))
    assert len(log.read_text().splitlines()) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["rows.npy"]


# ------------------------------------------------------------ accelerate's launcher


@pytest.mark.slow
def test_the_launcher_starts_two_processes(sources, tmp_path):
    """With the config that ships, as the README has it."""
    one = job(tmp_path / "two", sources, max_train_steps=2, train_batch_size=3)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "cpu_2.yaml"),
    ]
    command += ["--main_process_port", "0", "-m", "training.text_to_image", *one["args"][2:]]
    done = launch(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pipeline saved in") == 1
    assert len(list((tmp_path / "two" / "run" / "checkpoint-2").glob("random_states_*.pkl"))) == 2


@pytest.mark.slow
def test_a_launcher_that_starts_one_of_two_is_found_out(sources, tmp_path):
    one = job(tmp_path, sources, max_train_steps=2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = launch([*command, "-m", "training.text_to_image", *one["args"][2:]])
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "accelerate launch was asked for several processes and started one" in done.stderr


def launch(command: list[str]) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
