"""Our classes timed against diffusers' with the same weights, in alternation: `make bench`.

A machine's clock rate and other load change from minute to minute. Each round therefore times both sides one
after the other, and the table gives the median of the rounds' ratios along with each side's fastest time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler as TheirScheduler
from diffusers import UNet2DConditionModel

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline

MODEL = Path(__file__).parent.parent / "models" / "emoji"
UNET = {
    "sample_size": 16, "block_out_channels": (128, 256), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4, "cross_attention_dim": 256,
}  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> str:
    """One line of the table; a ratio above 1 means that ours is faster."""
    ours(), theirs()  # the first call of each allocates memory
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in times)
    best = [min(column) * 1000 for column in zip(*times, strict=True)]
    return f"{name:<46} {best[0]:9.1f} {best[1]:9.1f} {ratio:7.2f}"


def unet_lines(rounds: int) -> list[str]:
    torch.manual_seed(0)
    ours, theirs = ConditionalUNet(**UNET), UNet2DConditionModel(**UNET)
    theirs.load_state_dict(ours.state_dict())
    lines = []
    for batch in (2, 16):
        x, text = torch.randn(batch, 4, 16, 16), torch.randn(batch, 32, 256)
        t = torch.randint(0, 1000, (batch,))

        def forward(model: torch.nn.Module, given: tuple[torch.Tensor, ...] = (x, t, text)) -> None:
            with torch.no_grad():
                model(*given)

        def both_ways(model: torch.nn.Module, given: tuple[torch.Tensor, ...] = (x, t, text)) -> None:
            model(*given).sample.square().mean().backward()

        for label, work in (("forward", forward), ("forward and backward", both_ways)):
            sides = partial(work, ours), partial(work, theirs)
            lines.append(compare(f"U-Net {label}, batch {batch}", *sides, rounds))
    return lines


def scheduler_line(rounds: int) -> str:
    """1000 ancestral steps on a 64 x 64 picture, without a network."""

    def run(scheduler: DDPMScheduler | TheirScheduler) -> None:
        scheduler.set_timesteps(1000)
        generator, x = torch.Generator().manual_seed(0), torch.zeros(1, 3, 64, 64)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x, generator=generator, return_dict=False)[0]

    sides = (lambda: run(DDPMScheduler())), (lambda: run(TheirScheduler()))
    return compare("scheduler, 1000 steps at 64 x 64", *sides, rounds)


def picture_line(rounds: int) -> str:
    """One picture from a prompt, by the shipped model with its own defaults; ours only."""
    pipe = TextToImagePipeline.from_pretrained(str(MODEL))
    pipe.set_progress_bar_config(disable=True)
    pipe("a red heart")
    best = min(seconds(lambda: pipe("a red heart")) for _ in range(rounds))
    steps = pipe.config.default_num_inference_steps
    return f"{f'a picture from a prompt, {steps} steps':<46} {best * 1000:9.1f} {'-':>9} {'-':>7}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each side is timed")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; ms, fastest of {rounds} rounds")
    print(f"{'':<46} {'ours':>9} {'diffusers':>9} {'ratio':>7}")
    print(*unet_lines(rounds), scheduler_line(rounds), sep="\n")
    if MODEL.is_dir():
        print(picture_line(rounds))


if __name__ == "__main__":
    main()
