"""Ways to damage a file: as a disk, a careless editor or an enemy would."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable

#: What takes the place of a JSON value.
_STRANGE = (
    b"null", b"true", b"-1", b"0", b"1.5", b"1e308", b"1e999", b"-Infinity", b"NaN", b"9" * 40, b"9" * 5000,
    b'""', b'"x"', b'"' + b"y" * 20_000 + b'"', b'"\\ud800"', b'"../../../etc/passwd"', b"[]", b"{}", b"[[]]", b'{"a": {}}',
    b"[" * 3000 + b"]" * 3000, b"[" * 200_000, b'{"a":' * 50_000,
)  # fmt: skip
_VALUE = re.compile(rb'(?<=[:\[,])\s*("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|\[[^\[\]]*\]|\{[^{}]*\})')
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:')

Damage = Callable[[bytes, random.Random], bytes]


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    """One to three bits, as a disk does."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The file ends early."""
    return data[: draw.randrange(len(data))]


def remove(data: bytes, draw: random.Random) -> bytes:
    """A piece in the middle is missing."""
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randint(1, 64) :]


def insert(data: bytes, draw: random.Random) -> bytes:
    """A piece is there a second time, or bytes that do not belong there."""
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    piece = data[start : min(end, start + 64)] if draw.random() < 0.5 else draw.randbytes(draw.randint(1, 16))
    place = draw.randrange(len(data) + 1)
    return data[:place] + piece + data[place:]


def replace_value(data: bytes, draw: random.Random) -> bytes:
    """A JSON value becomes one of another type or size."""
    found = list(_VALUE.finditer(data))
    if not found:
        return insert(data, draw)
    chosen = draw.choice(found)
    return data[: chosen.start(1)] + draw.choice(_STRANGE) + data[chosen.end(1) :]


def change_key(data: bytes, draw: random.Random) -> bytes:
    """A JSON key has another name, or that of another key."""
    found = list(_KEY.finditer(data))
    if not found:
        return remove(data, draw)
    chosen, other = draw.choice(found), draw.choice(found)
    name = draw.choice((b"", b"x", b"__class__", chosen[1] + b"x", other[1]))
    return data[: chosen.start(1)] + name + data[chosen.end(1) :]


def replace_all(data: bytes, draw: random.Random) -> bytes:
    """The whole file is something else."""
    return draw.choice(
        (*_STRANGE, b"", b"\0" * 100, b"\xff\xfe\xff", b"<html>not found</html>", b"version https://git-lfs", b"\x80\x04.")
    )


def _header(change: Damage) -> Damage:
    """`change` on the JSON header of a safetensors file, whose length is corrected."""

    def damaged(data: bytes, draw: random.Random) -> bytes:
        if len(data) < 8 or len(data) < 8 + (size := struct.unpack("<Q", data[:8])[0]):
            return flip_bits(data, draw)
        header = change(data[8 : 8 + size], draw)
        return struct.pack("<Q", len(header)) + header + data[8 + size :]

    return damaged


def _described(change: Damage) -> Damage:
    """`change` on a JSON text within the metadata of a safetensors header: the description of an adapter."""

    def damaged(header: bytes, draw: random.Random) -> bytes:
        try:
            content = json.loads(header)
            texts = content["__metadata__"]
            name = draw.choice(sorted(texts))
            texts[name] = change(texts[name].encode(), draw).decode("utf-8", "replace")
            return json.dumps(content).encode()
        except (ValueError, KeyError, IndexError):
            return flip_bits(header, draw)

    return damaged


_BYTES: tuple[Damage, ...] = (flip_bits, cut, remove, insert)
_JSON: tuple[Damage, ...] = (replace_value, replace_value, change_key)


def damaged(name: str, data: bytes, draw: random.Random) -> bytes:
    """The content of the file `name` after one damage that fits its kind."""
    if not data:
        return draw.choice(_STRANGE)
    ways = _BYTES
    if name.endswith(".safetensors"):
        ways = (*_BYTES, *map(_header, (*_BYTES, *_JSON)), *(_header(_described(change)) for change in (*_BYTES, *_JSON)))
    elif name.endswith((".json", ".jsonl", ".yaml")):
        ways = (*_BYTES, *_JSON, *_JSON)
    if draw.random() < 0.02:
        return replace_all(data, draw)
    return draw.choice(ways)(data, draw)
