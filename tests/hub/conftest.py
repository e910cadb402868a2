"""The loopback Hub, and other processes that push to it and pull from it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.server import LoopbackHub

REPOSITORY = Path(__file__).parents[2]


class Elsewhere:
    """Runs code in processes that have never seen this repository, one after the other, with the real client.

    `elsewhere(code, ours=False, token="hf_me", **names)` returns what the code leaves in `value`; `names` are
    variables for it, and `ours` puts this repository on its path. An exception in there is raised here as a
    `Raised`. The processes are copies of one that has imported diffusers, or with `fresh` start from nothing.
    """

    def __init__(self, hub: LoopbackHub, home: Path):
        self.home, self.working = home, home / "somewhere"
        self.working.mkdir(parents=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
        self.environment = kept | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        self.command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.working,
            env=self.environment,
        )
        self.fresh = False
        self.output = ""  # of the last piece of code

    def __call__(self, code: str, ours: bool = False, token: str | None = "hf_me", **names: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        start = [f"{name} = {value!r}" for name, value in names.items()]
        start += [f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})"] if ours else []
        request = {"code": "\n".join([*start, code]), "environment": {"HF_TOKEN": token} if token else {}}
        if self.fresh:
            once = [*self.command, "once"]
            options: dict[str, Any] = {"text": True, "cwd": self.working, "env": self.environment}
            line = subprocess.run(once, input=json.dumps(request), stdout=subprocess.PIPE, **options).stdout
        else:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        answer = json.loads(line)
        self.output = answer["output"]
        if "error" in answer:
            raise Raised(answer["error"], answer["message"], answer.get("trace", "") + self.output)
        return answer["value"]

    def forget(self) -> None:
        """Empty the caches, of downloads and of code."""
        shutil.rmtree(self.home / "hf", ignore_errors=True)


class Raised(Exception):
    """What code elsewhere raised: `kind`, and the message."""

    def __init__(self, kind: str, message: str, trace: str):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@pytest.fixture(scope="session")
def _server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="session")
def _elsewhere(_server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    worker = Elsewhere(_server, tmp_path_factory.mktemp("elsewhere"))
    yield worker
    worker.process.kill()
    worker.process.wait()


@pytest.fixture
def hub(_server: LoopbackHub) -> LoopbackHub:
    """An empty Hub without faults."""
    _server.repositories.clear()
    _server.storage.clear()
    _server.requests.clear()
    _server.repair()
    return _server


@pytest.fixture
def elsewhere(_elsewhere: Elsewhere, hub: LoopbackHub) -> Elsewhere:
    """Other processes, with empty caches."""
    _elsewhere.fresh = False
    _elsewhere.forget()
    return _elsewhere
