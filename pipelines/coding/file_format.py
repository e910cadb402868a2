"""The bytes of a coded file: a header in JSON, then chunks, each with its checksum."""

import json
import zlib
from typing import Any

from ..chain.equations import require

MAGIC = b"corgi\x01"


def length(value: int) -> bytes:
    """7 bits in each byte, the lowest first; the top bit is set if another byte follows."""
    head, rest = value & 127, value >> 7
    return bytes([head | 128]) + length(rest) if rest else bytes([head])


def pack(header: dict[str, Any], chunks: list[tuple[int, bytes]]) -> tuple[bytes, int]:
    """(file, bytes of its header).

    Magic, the header as JSON, its CRC-32; then for each chunk the number of latents in it, its length, its
    payload and the CRC-32 of everything so far except checksums. The last chunk has 0 latents.
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data = MAGIC + length(len(text)) + text
    crc = zlib.crc32(data)
    data += crc.to_bytes(4, "little")
    size = len(data)
    for latents, payload in chunks:
        part = bytes([latents]) + length(len(payload)) + payload
        crc = zlib.crc32(part, crc)
        data += part + crc.to_bytes(4, "little")
    return data, size


class Reader:
    """Takes bytes from the start of a file and keeps their CRC-32."""

    def __init__(self, data: bytes):
        self.data, self.place, self.crc = data, 0, 0

    def take(self, count: int, checked: bool = True) -> bytes:
        part = self.data[self.place : self.place + count]
        if len(part) < count:
            raise EOFError
        self.place += count
        self.crc = zlib.crc32(part, self.crc) if checked else self.crc
        return part

    def length(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    def check(self, what: str) -> None:
        expected, crc = self.crc, int.from_bytes(self.take(4, checked=False), "little")
        require(crc == expected, f"checksum of {what}", f"{crc:08x}", f"{expected:08x}: the file is damaged")


def unpack(data: bytes, prefix: bool) -> tuple[dict[str, Any], list[tuple[int, bytes]], bool]:
    """(header, chunks, whether all chunks are there) of a file made by `pack`."""
    reader = Reader(data)
    try:
        begins = reader.take(len(MAGIC)) == MAGIC
        require(begins, "file", data[: len(MAGIC)], f"one that begins with {MAGIC!r}")
        text = reader.take(reader.length())
        reader.check("the header")
    except EOFError:
        raise ValueError(f"the file is cut off in its header, after {len(data)} bytes") from None
    header = json.loads(text)
    chunks: list[tuple[int, bytes]] = []
    while not chunks or chunks[-1][0]:
        try:
            latents = reader.take(1)[0]
            payload = reader.take(reader.length())
            reader.check(f"chunk {len(chunks) + 1}")
        except EOFError:
            if prefix and header["kind"] == "progressive":
                return header, chunks, False
            hint = "; --prefix decodes what is there" if header["kind"] == "progressive" else ""
            raise ValueError(f"the file is cut off in chunk {len(chunks) + 1}{hint}") from None
        chunks.append((latents, payload))
    beyond = len(data) - reader.place
    require(not beyond, "bytes after the end", beyond, "0: the file is damaged")
    return header, chunks, True
