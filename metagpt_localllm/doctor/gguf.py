"""The metadata in front of a GGUF file (ggml/docs/gguf.md), without its tensors and without a library for them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["metadata"]

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
#: Arrays of more items are vocabularies: they are read over.
_SHORT = 1024
#: More entries or longer names than any file has.
_ABSURD = 1 << 20


def metadata(path: Path) -> dict[str, Any]:
    """The file's metadata by name; long arrays are left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF of version 2 or 3, or is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
            raise ValueError(f"{path} is no GGUF file")
        _number(file, "<Q")  # tensors
        entries = _number(file, "<Q")
        if entries > _ABSURD:
            raise ValueError(f"{path} is damaged")
        found = {}
        for _ in range(entries):
            name = _text(file)
            value = _value(file, _number(file, "<I"))
            if value is not None:
                found[name] = value
        return found


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the file ends in its metadata")
    return data


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, _read(file, struct.calcsize(form)))[0]


def _text(file: BinaryIO) -> str:
    size = _number(file, "<Q")
    if size > 64 * _ABSURD:
        raise ValueError("the file is damaged")
    return _read(file, size).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _NUMBERS:
        return _number(file, _NUMBERS[kind])
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        raise ValueError(f"the file has a value of the unknown kind {kind}")
    of, count = _number(file, "<I"), _number(file, "<Q")
    if count <= _SHORT:
        return [_value(file, of) for _ in range(count)]
    if of in _NUMBERS:
        file.seek(count * struct.calcsize(_NUMBERS[of]), 1)
    elif of == _TEXT:
        for _ in range(count):
            file.seek(_number(file, "<Q"), 1)
    else:
        raise ValueError("the file has a long array of arrays")
    return None
