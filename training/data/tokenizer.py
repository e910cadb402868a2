"""CLIP's byte-pair tokenizer, whole or with a smaller vocabulary, built from the merges open_clip ships.

A text tower trained from scratch on emoji captions has no use for 49,408 token vectors: keeping the first
8,192 merges makes its embedding table six times smaller, and still spells every string (bytes are tokens).
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

from transformers import CLIPTokenizer

NUM_CLIP_MERGES = 49152 - 256 - 2  # what OpenAI's CLIP uses of the 262,144 merges in the file
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"


def bytes_to_characters() -> dict[int, str]:
    """The printable stand-in for each of the 256 bytes, in the order of CLIP's token ids (Radford 2019).

    Printable bytes stand for themselves and come first; the other 68 get the characters from 256 up.
    """
    printable = [byte for a, b in ("!~", "¡¬", "®ÿ") for byte in range(ord(a), ord(b) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def read_clip_merges(num_merges: int = NUM_CLIP_MERGES) -> list[tuple[str, str]]:
    """The first `num_merges` pairs of CLIP's merge table, the most frequent first.

    Raises ValueError when `num_merges` is not in 0..48894, FileNotFoundError when open_clip is not installed.
    """
    if not 0 <= num_merges <= NUM_CLIP_MERGES:
        raise ValueError(f"num_merges must be in 0..{NUM_CLIP_MERGES}, got {num_merges}")
    spec = find_spec("open_clip")  # finds the folder without the seconds that importing it takes
    if spec is None or spec.origin is None:
        raise FileNotFoundError("CLIP's merges come with open_clip: pip install open_clip_torch")
    path = Path(spec.origin).with_name(_MERGES_FILE)
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    pairs = [line.split() for line in lines[1 : 1 + num_merges]]  # line 0 is a version comment
    return [(first, second) for first, second in pairs]


def build_clip_tokenizer(num_merges: int = 8192, model_max_length: int = 77) -> CLIPTokenizer:
    """A `CLIPTokenizer` over CLIP's first `num_merges` merges; with all 48,894 it is CLIP's own.

    The num_merges + 514 ids are the 256 bytes, the same 256 at the end of a word (`</w>`), one id for each
    merge, then start of text and end of text. Padding is the end of text too, as in CLIP.

    `model_max_length` includes start and end of text. It is always set: under transformers 5, a CLIPTokenizer
    without it overflows when asked to pad or truncate.

    Raises ValueError when `num_merges` is not in 0..48894 or `model_max_length` is below 3.
    """
    if model_max_length < 3:
        rule = "3 or more, to hold start, a token, end"
        raise ValueError(f"model_max_length must be {rule}; got {model_max_length}")
    merges = read_clip_merges(num_merges)
    characters = list(bytes_to_characters().values())
    tokens = characters + [character + "</w>" for character in characters]
    tokens += [first + second for first, second in merges] + [START_TOKEN, END_TOKEN]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)
