"""The number format of a run's matrix products, and its attention kernels."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

PRECISIONS = (None, "auto", "no", "fp16", "bf16")


def resolve_precision(mixed_precision: str | None) -> str | None:
    """For "auto", "bf16" if the device supports it in hardware, otherwise "no". Other values are returned as
    they are.

    A CPU without AVX512-BF16 or AMX (or Arm's BF16) emulates it, about fifty times slower than fp32.
    """
    if mixed_precision != "auto":
        return mixed_precision
    device = torch.accelerator.current_accelerator(check_available=True)
    return "bf16" if has_bf16("cpu" if device is None else device.type) else "no"


@functools.cache
def has_bf16(device: str) -> bool:
    """Whether devices of this type multiply bf16 matrices in hardware."""
    if device == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def attention_of(accelerator: Accelerator) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function that makes the context to train in: torch's own choice of attention kernels, or plain matrix
    products on a CPU in bf16, where the backward pass of the fused kernel took three times as long as in
    fp32."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return functools.partial(sdpa_kernel, SDPBackend.MATH)
    return contextlib.nullcontext
