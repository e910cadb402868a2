"""A process that imports diffusers once and then runs pieces of code, each in a fresh copy of itself.

    python -P worker.py         reads lines of JSON, {"code", "environment"}, and answers each with
                                {"value", "output"} or {"error", "message", "trace", "output"}
    python -P worker.py once    one line only, run by this very process, which has imported nothing before

It is started away from this repository and without it on sys.path, so its copies are strangers to it.
"""

import json
import os
import sys
import traceback
from typing import Any


def run(request: dict[str, Any], answer: int) -> None:
    output = os.memfd_create("output")
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])
    names: dict[str, Any] = {"value": None}
    result: dict[str, Any] = {}
    try:
        exec(compile(request["code"], "<request>", "exec"), names)
        result["value"] = names["value"]
    except BaseException as error:
        result |= {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.lseek(output, 0, os.SEEK_END)
    result["output"] = os.pread(output, size, 0).decode(errors="replace")
    os.write(answer, json.dumps(result, default=str).encode())
    os._exit(0)


def main() -> None:
    if sys.argv[1:] == ["once"]:
        run(json.loads(sys.stdin.readline()), os.dup(1))
    import datasets  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    # lazy modules load what is named
    for name in ("StableDiffusionPipeline", "DiffusionPipeline", "UNet2DConditionModel", "DDPMScheduler"):
        getattr(diffusers, name)
    for name in ("CLIPTextModelWithProjection", "CLIPTokenizer"):
        getattr(transformers, name)
    for line in sys.stdin:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reader)
            run(json.loads(line), writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        died = json.dumps({"error": "Died", "message": "no answer", "output": ""})
        print(answer.decode() or died, flush=True)


if __name__ == "__main__":
    main()
