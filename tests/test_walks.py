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

from page import common, create
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


def test_a_request_of_the_page_goes_through_at_most_13_rooms_and_75_moves(
    pipeline: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the page's function to the PNG: one picture of 5 steps with classifier-free guidance."""
    monkeypatch.setattr(common, "get_upload_folder", lambda: str(tmp_path))
    pipeline.register_to_config(_name_or_path="tiny")
    generate = create.generate_event(pipeline)
    size = create.sizes(pipeline)[0][1]
    asked = ("a red heart", "", "Any", 5, 2.0, 3, 1, size, 0, 0, 0, "", 0.7, 0, "noised", 0, None, 1, "", [])

    def request() -> None:
        list(generate(*asked, progress=lambda *_, **__: None))

    request()
    rooms, moves = walk(request)
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert "page/create.py" in rooms and "pipelines/drawing/png.py" in rooms
    assert len(rooms) <= 13, sorted(rooms)
    assert moves.total() <= 75, moves
