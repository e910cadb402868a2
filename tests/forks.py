"""A process that imports everything once and then forks: children start at once, and may be killed.

Started by a test (`Forks`), it reads one JSON line for each group of jobs that run at the same time, and
answers with one line. It computes nothing itself, so that OpenMP has no threads that a fork would lose.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Forks:
    """The test's end: `run(job, ...)` runs jobs together and returns (exit code, seconds, output) of each.

    A job is {"call": name of a function below, "args": its arguments, "env": additions to the environment,
    "kill": {"seconds": s, "file": path, "lines": n}}: SIGKILL s seconds after that file has grown by n lines
    (1 unless said), or without a file after the start.
    """

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *jobs: dict[str, Any]) -> list[tuple[int, float, str]]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return [tuple(result) for result in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------ jobs


def train(losses: str, stop: int, *arguments: str) -> None:
    """`python -m training.text_to_image`; adds to `losses` a line for each step; ends after step `stop`."""
    from training import text_to_image
    from training.run import loop

    real = loop.fit

    def fit(*args: Any, **kwargs: Any) -> Any:
        for result in real(*args, **kwargs):
            with open(losses, "a") as file:
                line = [result.step, result.loss, result.learning_rate, time.monotonic()]
                file.write(json.dumps(line) + "\n")
            yield result
            if result.step == stop:
                os._exit(0)

    loop.fit = fit
    sys.argv = ["text_to_image", *arguments]
    text_to_image.main()


def fill_cache(path: str, log: str) -> None:
    """`memory_map` of an array that takes half a second to fill; a line in `log` for each filling."""
    import numpy as np

    from training.data.arrays import memory_map

    def fill(target: Any) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        target[:500] = 7
        time.sleep(0.5)
        target[500:] = 7

    array = memory_map(Path(path), (1000, 10), np.dtype(np.int64), fill)
    assert (array == 7).all()


# ------------------------------------------------------------ the forking process


def start(job: dict[str, Any]) -> tuple[int, int, float]:
    """(process, its output's file descriptor, when it began)."""
    output = os.memfd_create("output")
    began = time.monotonic()
    process = os.fork()
    if process:
        return process, output, began
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(job.get("env", {}))
        globals()[job["call"]](*job["args"])
        code = 0
    except SystemExit as stop:
        print(stop, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch(job: dict[str, Any], process: int, lines: int) -> int:
    """The process's end, brought about if the job says so; its exit code, or minus the signal."""
    kill_at = None
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        kill = job.get("kill")
        if kill and kill_at is None:
            if "file" not in kill or lines_of(kill["file"]) >= lines + kill.get("lines", 1):
                kill_at = time.monotonic() + kill["seconds"]
        if kill_at is not None and time.monotonic() >= kill_at:
            os.kill(process, signal.SIGKILL)
            kill_at = float("inf")
        time.sleep(0.002)


def lines_of(path: str) -> int:
    return Path(path).read_bytes().count(b"\n") if os.path.exists(path) else 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    import training.text_to_image  # noqa: F401

    for line in sys.stdin:
        jobs = json.loads(line)
        counts = [lines_of(job.get("kill", {}).get("file", "")) for job in jobs]
        started = [start(job) for job in jobs]
        results = []
        for job, (process, output, began), before in zip(jobs, started, counts, strict=True):
            code = watch(job, process, before)
            os.lseek(output, 0, os.SEEK_SET)
            with os.fdopen(output, "rb") as file:
                text = file.read().decode(errors="replace")
            results.append((code, time.monotonic() - began, text))
        answers.write(json.dumps(results) + "\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
