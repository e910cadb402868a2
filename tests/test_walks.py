"""How many rooms a call goes through: a room is a file of ours, a move a call from one of them into another.

The caller is the nearest frame of ours; frames of libraries between the two are skipped.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from page import requests
from pipelines import TextToImagePipeline
from training.data.caches import cache_text
from training.data.pictures import PictureCache, StepBatchSampler
from training.objectives.denoising import DenoisingLoss
from training.run.averages import make_ema
from training.run.loop import fit
from training.run.optimizers import make_optimizer
from training.text_to_image import TextToImageConfig

ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
ROOMS = tuple(ROOT + name for name in ("app.py", "page", "pipelines", "training"))


def walk(call: Callable[[], Any]) -> tuple[set[str], Counter[tuple[str, str]]]:
    """(rooms, how often each pair of rooms was crossed) of one call."""
    rooms: set[str] = set()
    moves: Counter[tuple[str, str]] = Counter()

    def room(frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        return name.removeprefix(ROOT) if name.startswith(ROOMS) else None

    def watch(frame: FrameType, event: str, _: Any) -> None:
        here, caller = room(frame), frame.f_back
        if event != "call" or here is None:
            return
        rooms.add(here)
        while caller is not None and room(caller) is None:
            caller = caller.f_back
        if caller is not None and room(caller) != here:
            moves[room(caller) or "", here] += 1

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return rooms, moves


def test_a_training_step_goes_through_at_most_8_rooms_and_15_moves(
    pipeline: TextToImagePipeline, tmp_path: Path
) -> None:
    """The second of three steps of text to image on cached text, with min-SNR weights and an average."""
    AcceleratorState._reset_state(reset_partial_state=True)
    captions = ["", "red heart", "dog face", "a pizza"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    pictures = PictureCache(pixels, captions, [[1], [2], [3]], {})
    text = cache_text(captions, pipeline.tokenizer, pipeline.text_encoder, tmp_path)
    accelerator = Accelerator(cpu=True)
    optimizer = make_optimizer("adamw", [pipeline.unet], 1e-4, 1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    unet, optimizer, schedule = accelerator.prepare(pipeline.unet, optimizer, schedule)
    config = TextToImageConfig(output_dir=str(tmp_path))
    steps = fit(
        accelerator, unet, optimizer, schedule, iter(StepBatchSampler(3, 2, 0)),
        DenoisingLoss(config, pipeline, unet, pictures, text),
        max_train_steps=3, ema=make_ema(0.99, unet),
    )  # fmt: skip
    next(steps)
    rooms, moves = walk(lambda: next(steps))
    assert "training/objectives/denoising.py" in rooms and "pipelines/components/conditional_unet.py" in rooms
    assert len(rooms) <= 8, sorted(rooms)
    assert moves.total() <= 15, moves


def test_a_picture_of_five_steps_goes_through_at_most_9_rooms_and_45_moves() -> None:
    """The shipped model, which sees its own guess of x0, with classifier-free guidance."""
    pipe = TextToImagePipeline.from_pretrained(ROOT + "models/emoji")
    pipe.set_progress_bar_config(disable=True)

    def draw() -> None:
        pipe("a corgi in a party hat", num_inference_steps=5, guidance_scale=2.0)

    rooms, moves = walk(draw)
    crossed = "pipelines/drawing/loop.py", "pipelines/components/conditional_unet.py"
    assert moves[crossed] == 5  # a pass a step, both halves of guidance in it
    assert len(rooms) <= 9, sorted(rooms)
    assert moves.total() <= 45, moves


def test_a_request_of_the_page_to_the_png(
    pipeline: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the function behind /generate: one picture of 5 steps with classifier-free guidance."""
    monkeypatch.setattr(requests, "get_upload_folder", lambda: str(tmp_path))
    asked: dict[str, Any] = {"prompt": "a red heart", "num_inference_steps": 5, "guidance_scale": 2.0}
    asked |= {"style": "Any", "seed": 3, "size": pipeline.sample_size[0], "num_images_per_prompt": 1}
    asked |= {"clip_guidance": "noised", "class_labels": None, "num_candidates": 1, "combined_weight": 0.7}
    numbers = "guidance_rescale guidance_from guidance_to clip_guidance_scale classifier_guidance_scale"
    asked |= dict.fromkeys(numbers.split(), 0)
    asked |= dict.fromkeys(("negative_prompt", "combined_prompt", "attention_words"), "")
    generate = requests.event(requests.generate, pipeline, asked, {})

    def request() -> None:
        list(generate(**asked, history=[], progress=lambda *_, **__: None))

    request()
    rooms, moves = walk(request)
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert [room for room in rooms if room.startswith("page")] == ["page/requests.py"]
    assert "pipelines/drawing/images.py" in rooms and "pipelines/drawing/loop.py" in rooms
    assert len(rooms) <= 10, sorted(rooms)
    assert moves.total() <= 60, moves
