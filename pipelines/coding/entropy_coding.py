"""Coders of Gaussian samples, for `progressive_coding`: no model, no pictures, numpy float64 throughout.

Two ways to send x ~ q to someone who knows p but not q:
    - `Stack`, asymmetric numeral systems by the library constriction: x itself, for -log2 p(x) bits; popping
      a sample of q off the stack first gives -log2 q(x) of them back ("bits back", Townsend 2019).
    - `choose_candidate` and `candidate`, relative entropy coding: the number of one of many samples of p that
      both sides can draw, chosen so that it has the distribution q, for KL(q || p) bits and a few more.

Papers: Townsend 2019 (arXiv 1901.04866); Li and El Gamal 2018 (1701.02827), the Poisson functional
representation; Theis and Yosri 2022 (2109.01591), ordered random coding.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray

LEVELS = 256
REACH = 8.0  # numbers within this many deviations of p's mean are coded by p, others by an escape
REACH_OF_Q = 5.0  # deviations at which q is cut off: its tails hold 6e-7
ESCAPE_BITS = 22  # for a number beyond the reach of p

CANDIDATES = 2**16 - 1
STARTS = np.arange(CANDIDATES) * 40503 % (CANDIDATES + 1)  # in the noise; successive ones are far apart
LENGTH_BITS = 4  # for the length of a candidate's number, whose binary digits follow


def constriction() -> Any:
    """The library of that name, or an ImportError that says how to get it."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError("coding needs constriction: pip install 'constriction>=0.4.2,<1'") from error
    return constriction


# ------------------------------------------------------------ bits back


class Stack:
    """Whole numbers under Gaussians, last in first out. Popping and pushing again restores the stack exactly.

    The mass of k under N(mean, std^2) is that between k - 1/2 and k + 1/2, in units of 2^-24. All array
    arguments have one shape (n,), float64 or int32.
    """

    def __init__(self, words: Array):
        self.coder = constriction().stream.stack.AnsCoder(np.ascontiguousarray(words, dtype=np.uint32))
        self.models = constriction().stream.model

    def words(self) -> Array:
        return self.coder.get_compressed()

    def _gaussian(self, reach: int) -> Any:
        return self.models.QuantizedGaussian(-reach, reach)

    def push(self, numbers: Array, mean: Array, std: Array, largest_std: float) -> None:
        """Numbers within 8 `largest_std` of the mean cost -log2 of their mass, at most 24 bits. Others cost
        22 bits more, which is less than their Gaussian would take.

        Raises:
            ValueError: a number lies 2^22 or more beyond that range.
        """
        reach, centre = math.ceil(REACH * largest_std), np.rint(mean)
        offset = numbers - centre
        inside = np.clip(offset, -reach, reach)
        beyond = np.abs(offset[np.abs(inside) == reach]) - reach
        if beyond.size and beyond.max() >= 2**ESCAPE_BITS:
            raise ValueError(f"a number {beyond.max() + reach:.0f} from its mean cannot be coded")
        if beyond.size:
            self.coder.encode_reverse(beyond.astype(np.int32), self.models.Uniform(2**ESCAPE_BITS))
        self.coder.encode_reverse(inside.astype(np.int32), self._gaussian(reach), mean - centre, std)

    def pop(self, mean: Array, std: Array, largest_std: float) -> Array:
        """The numbers that `push` pushed with the same arguments."""
        reach, centre = math.ceil(REACH * largest_std), np.rint(mean)
        offset = self.coder.decode(self._gaussian(reach), mean - centre, std).astype(np.float64)
        escaped = np.abs(offset) == reach
        if escaped.any():
            beyond = self.coder.decode(self.models.Uniform(2**ESCAPE_BITS), int(escaped.sum()))
            offset[escaped] += np.sign(offset[escaped]) * beyond
        return centre + offset

    def draw(self, mean: Array, std: Array, largest_std: float) -> Array:
        """Numbers from N(mean, std^2), cut off at 5 `largest_std`; drawing them uses up bits of the stack."""
        centre = np.rint(mean)
        model = self._gaussian(math.ceil(REACH_OF_Q * largest_std))
        numbers = centre + self.coder.decode(model, mean - centre, std)
        if self.coder.num_words() < 4:
            raise ValueError("the stack holds too few bits to draw from")
        return numbers

    def undraw(self, numbers: Array, mean: Array, std: Array, largest_std: float) -> None:
        """Give back the bits that `draw` used. Raises ValueError for numbers that it cannot have drawn."""
        centre, reach = np.rint(mean), math.ceil(REACH_OF_Q * largest_std)
        offset = numbers - centre
        if np.abs(offset).max() > reach:
            raise ValueError("a number lies where none could have been drawn")
        self.coder.encode_reverse(offset.astype(np.int32), self._gaussian(reach), mean - centre, std)

    def push_levels(self, levels: Array, mean: Array, std: Array) -> None:
        """Levels 0 .. 255, of which the first and the last include the tails (Ho 2020, eq. 13)."""
        model = self.models.QuantizedGaussian(0, LEVELS - 1)
        self.coder.encode_reverse(levels.astype(np.int32), model, mean, std)

    def pop_levels(self, mean: Array, std: Array) -> Array:
        return self.coder.decode(self.models.QuantizedGaussian(0, LEVELS - 1), mean, std)


# ------------------------------------------------------------ relative entropy coding


def windows(size: int, seed: list[int]) -> tuple[Array, Array]:
    """(noise (2^16,), signs (size,)), the randomness that both sides share.

    A candidate is signs * noise[start : start + size], cyclically. Each is N(0, I), and the products of a
    vector with all of them are one convolution. The signs are random and successive starts are far apart,
    because competing candidates would be alike otherwise.
    """
    random = np.random.default_rng(seed)
    return random.standard_normal(CANDIDATES + 1), random.choice([-1.0, 1.0], size)


def candidate(number: int, size: int, seed: list[int]) -> Array:
    """Candidate `number`, 1 .. 2^16 - 1: a sample of N(0, I), (size,)."""
    noise, signs = windows(size, seed)
    start = STARTS[number - 1]
    return signs * np.take(noise, np.arange(start, start + size), mode="wrap")


def choose_candidate(mean: Array, std: Array, seed: list[int]) -> int:
    """The number, from 1, of a candidate from p = N(0, I) that has the distribution q = N(mean, diag std^2).

    argmin_i T_i p(z_i)/q(z_i), where T_1 < T_2 < ... are the arrivals of a Poisson process (Li and El Gamal,
    section 3). With 2^16 - 1 candidates instead of infinitely many it is ordered random coding (Theis and
    Yosri, section 4): q loses what lies further out than any candidate. E log2 number <= KL + log2(e)/e + 1.

    mean, std: (size,), size at most 2^16.
    """
    noise, signs = windows(len(mean), seed)
    # log q(z)/p(z) = sum of linear z + square z^2, and a constant
    linear, square = mean / std**2, (1 - std**-2.0) / 2
    spectrum = np.fft.rfft(noise) * np.fft.rfft(signs * linear, len(noise)).conj()
    if square.any():
        spectrum += np.fft.rfft(noise**2) * np.fft.rfft(square, len(noise)).conj()
    log_weight = np.fft.irfft(spectrum, len(noise))[STARTS]
    gaps = np.random.default_rng([*seed, 1]).standard_exponential(CANDIDATES)
    return int(np.argmin(np.log(np.cumsum(gaps)) - log_weight)) + 1


# ------------------------------------------------------------ bits one by one


class Bits:
    """A sequence of bits that is written at its end and read from its start."""

    def __init__(self, data: bytes = b""):
        self.row = "".join(f"{byte:08b}" for byte in data)

    def __len__(self) -> int:
        return len(self.row)

    def to_bytes(self) -> bytes:
        padded = self.row + "0" * (-len(self.row) % 8)
        return bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8))

    def write(self, value: int, count: int) -> None:
        self.row += f"{value:0{count}b}" if count else ""

    def read(self, count: int) -> int:
        """Raises ValueError if fewer bits are left."""
        if count > len(self.row):
            raise ValueError("the data ends too early")
        value, self.row = self.row[:count], self.row[count:]
        return int(value or "0", 2)

    def write_number(self, number: int) -> None:
        """A candidate's number: 4 bits for its length, then all its binary digits but the first."""
        length = number.bit_length() - 1
        self.write(length, LENGTH_BITS)
        self.write(number - 2**length, length)

    def read_number(self) -> int:
        length = self.read(LENGTH_BITS)
        return 2**length + self.read(length)

    def write_change(self, change: int) -> None:
        """1 bit for 0, 3 bits for 1 and -1: Elias's gamma code of 1, 2, 3, ... stands for 0, 1, -1, ..."""
        code = 2 * change if change > 0 else 1 - 2 * change
        self.write(0, code.bit_length() - 1)
        self.write(code, code.bit_length())

    def read_change(self) -> int:
        zeros = 0
        while self.read(1) == 0:
            zeros += 1
        code = 2**zeros + self.read(zeros)
        return code // 2 if code % 2 == 0 else -(code // 2)
