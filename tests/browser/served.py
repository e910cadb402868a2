"""The page as people get it: `python app.py` in a process of its own, with a tiny model of random weights.

Imported by tests/page/test_app.py (gradio's client) and tests/browser/ (a real browser).
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import (
    DDPMScheduler,
    NoisyClassifier,
    NoisyCLIP,
    SuperResolutionPipeline,
    TextToImagePipeline,
)

ROOT = Path(__file__).parents[2]
TRAIN_TIMESTEPS = 200  # fewer than the page's slider goes to, so that the pipeline has something to refuse
SIDE = 32
LABELS = ["animals", "food", "travel"]

# Runs first in the app's process: notes every address outside the machine that Python asks for.
WITNESS = """
import sys

def witness(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host and str(host) not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
        with open({log!r}, "a") as log:
            log.write(str(host) + "\\n")

sys.addaudithook(witness)
"""


@dataclass
class Served:
    url: str
    folder: Path  # the model it draws with
    log: Path
    outside: Path  # one line for each address outside the machine

    def load(self) -> TextToImagePipeline:
        """The same models in this process, to tell what the page should show."""
        guides = self.folder.with_name(f"{self.folder.name}-guidance")
        pipe = TextToImagePipeline.from_pretrained(
            self.folder,
            noisy_clip=NoisyCLIP.from_pretrained(guides / "noisy_clip").eval(),
            noisy_classifier=NoisyClassifier.from_pretrained(guides / "noisy_classifier").eval(),
        )
        pipe.upsampler = SuperResolutionPipeline.from_pretrained(
            self.folder.with_name(f"{self.folder.name}-upsampler")
        )
        for one in (pipe, pipe.upsampler):
            one.set_progress_bar_config(disable=True)
        return pipe


def save_tiny_model(
    folder: Path, tokenizer: Any, make_text_encoder: Any, make_unet: Any, make_upsampler: Any
) -> None:
    """Pipelines of random weights from the fixtures of tests/conftest.py, and models that guide, beside each
    other where the page looks for them."""
    make_upsampler().save_pretrained(str(folder.with_name(f"{folder.name}-upsampler")))
    torch.manual_seed(4)
    guides: dict[str, Any] = {
        "noisy_clip": NoisyCLIP(
            sample_size=SIDE, patch_size=8, width=16, layers=1, heads=2, projection_dim=24
        ),
        "noisy_classifier": NoisyClassifier(LABELS, SIDE, 3, 4, (8, 16), 4, 2),
    }
    for name, model in guides.items():
        for parameter in model.parameters():  # what they begin with is too small to be seen in a picture
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(str(folder.with_name(f"{folder.name}-guidance") / name))
    TextToImagePipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(),
        unet=make_unet(sample_size=SIDE),
        scheduler=DDPMScheduler(num_train_timesteps=TRAIN_TIMESTEPS),
        default_guidance_scale=3.5,
        default_num_inference_steps=6,
    ).save_pretrained(str(folder))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serve(folder: Path, work: Path, seconds: float = 300) -> Iterator[Served]:
    """`python app.py` with the model of `folder`; its log and what it asks of the network go to `work`."""
    served = Served(f"http://127.0.0.1:{free_port()}", folder, work / "app.log", work / "outside.txt")
    served.outside.touch()
    (work / "sitecustomize.py").write_text(WITNESS.format(log=str(served.outside)))
    settings = ("GRADIO_", "HF_", "CORGI_")  # the app must do without whatever is set here
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)} | {
        "CORGI_MODEL": str(folder),
        "GRADIO_SERVER_PORT": served.url.rsplit(":", 1)[1],
        "GRADIO_TEMP_DIR": str(work / "gradio"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(work),
        "PYTHONUNBUFFERED": "1",
    }
    with served.log.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + seconds
            while not answers(served.url):
                assert process.poll() is None, f"app.py ended:\n{served.log.read_text()}"
                assert time.monotonic() < deadline, f"app.py does not answer:\n{served.log.read_text()}"
                time.sleep(0.2)
            yield served
            assert process.poll() is None, f"app.py ended during the tests:\n{served.log.read_text()}"
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/config", timeout=5) as reply:
            return json.load(reply)["title"] == "Corgi"
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def expected(pipe: TextToImagePipeline, prompt: str, seed: int, **options: object) -> np.ndarray:
    """(H, W, 3) uint8: the picture that the pipeline itself draws of a prompt with a seed."""
    generator = torch.Generator().manual_seed(seed)
    (image,) = pipe(prompt, generator=generator, **options).images
    return np.asarray(image)


def same_picture(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to the last bit but one: threads of another process may sum in another order."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1
