"""Kept for one minor version: the command is `python -m pipelines.coding`, the functions are in
`pipelines.coding.progressive_coding`."""

import sys
import warnings

from .coding.__main__ import main
from .coding.progressive_coding import Decoded, decode, encode

__all__ = ["Decoded", "decode", "encode", "main"]

warnings.warn(
    "pipelines.progressive_coding has moved: run `python -m pipelines.coding`, import from "
    "pipelines.coding.progressive_coding",
    FutureWarning,
    stacklevel=2,
)

if __name__ == "__main__":
    sys.exit(main())
