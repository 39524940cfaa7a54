"""Broken files, made from sound ones: flipped bits, cuts, lying lengths, deep nesting. Seeded, so that each can be had again."""

from __future__ import annotations

import random
import struct

LYING = (0, 1, 2, 7, 0x7FFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)


def mutant(data: bytes, seed: int, *, within: int = 4096) -> bytes:
    """A broken copy of a DICOM file.

    Args:
        data: a sound file; seed: the same one makes the same copy.
        within: most changes fall into so many first bytes, where the elements stand.
    """
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice((_flip, _flip, _byte, _lie, _lie, _cut, _swap, _insert, _nest, _repeat))(
            changed, rng, min(within, len(changed))
        )
        if len(changed) < 8:
            break
    return bytes(changed)


def _flip(data: bytearray, rng: random.Random, within: int) -> None:
    data[rng.randrange(within)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random, within: int) -> None:
    data[rng.randrange(within)] = rng.choice((0, 0xFF, 0x5C, 0x1B, 0x7F, rng.randrange(256)))


def _header(data: bytearray, rng: random.Random, within: int) -> int:
    """Where an element of explicit VR seems to begin, or anywhere."""
    start = rng.randrange(132, within) if within > 140 else rng.randrange(within)
    for position in range(start, min(start + 400, len(data) - 12)):
        if data[position + 4 : position + 6].isalpha() and data[position + 4 : position + 6].isupper():
            return position
    return min(start, max(len(data) - 12, 0))


def _lie(data: bytearray, rng: random.Random, within: int) -> None:
    position, length = _header(data, rng, within), rng.choice(LYING)
    if rng.random() < 0.5:
        data[position + 6 : position + 8] = struct.pack("<H", length & 0xFFFF)
    else:
        data[position + 8 : position + 12] = struct.pack("<I", length)


def _cut(data: bytearray, rng: random.Random, within: int) -> None:
    del data[rng.randrange(rng.choice((within, len(data))) or 1) :]


def _swap(data: bytearray, rng: random.Random, within: int) -> None:
    a, b, size = _header(data, rng, within), _header(data, rng, within), rng.choice((2, 4, 6, 8, 16))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _insert(data: bytearray, rng: random.Random, within: int) -> None:
    position = _header(data, rng, within)
    data[position:position] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def _repeat(data: bytearray, rng: random.Random, within: int) -> None:
    position = _header(data, rng, within)
    data[position:position] = data[position : position + rng.choice((8, 16, 64, 256))] * rng.choice((1, 2, 50))


def _nest(data: bytearray, rng: random.Random, within: int) -> None:
    """Sequences in sequences, of undefined length, perhaps never closed."""
    position, depth = _header(data, rng, within), rng.choice((1, 3, 60, 70, 2000))
    opened = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closed = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    data[position:position] = opened * depth + closed * rng.choice((0, depth, depth - 1))
