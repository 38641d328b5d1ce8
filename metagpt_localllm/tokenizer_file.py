"""Exact counts by a model's own ``tokenizer.json``. Only local files are read, with the ``tokenizers`` library.

The library is an extra, which MetaGPT 0.8.2 brings along; its newest dependencies want a click that breaks MetaGPT's typer.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from typing import Callable

__all__ = ["load_tokenizer"]

_REMEDY = "name the tokenizer.json that comes with the model's original weights, or the folder that holds it"
#: How files begin that are easily taken for it.
_OTHERS = {
    b"GGUF": "holds a model's weights (GGUF)",
    b"PK\x03\x04": "is an archive",
    b"version https://git-lfs": "is only the pointer that Git LFS puts in place of a file not fetched",
}


def load_tokenizer(path: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text, without those that a chat template adds.

    Args:
        path: of a ``tokenizer.json`` or of the folder that holds it; ``~`` is the home.

    Raises:
        ValueError: there is no such file, it is something else, or the library is missing; with what to do.
    """
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"there is no file {file}: {_REMEDY}")
        stat = file.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise ValueError(f"{path} cannot be read ({error}): {_REMEDY}") from None
    return _load(str(file.absolute()), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _load(path: str, _modified: int, _size: int) -> Callable[[str], int]:
    _refuse_others(path)
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        what = f"counting by {path} needs the tokenizers library ({error})"
        raise ValueError(f"{what}: run pip install tokenizers 'click<8.2'") from None
    try:
        tokenizer = library.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more special
        remedy = f"{_REMEDY}; if it is that, a newer library may know it: pip install -U tokenizers"
        raise ValueError(f"{path} is not a tokenizer that the library knows ({error}): {remedy}") from None
    tokenizer.no_truncation()  # files of embedding models cut at 512
    tokenizer.no_padding()

    def count(text: str) -> int:
        # A lone surrogate, which JSON can bring, is sent as a question mark.
        sound = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        return len(tokenizer.encode(sound, add_special_tokens=False))

    return count


def _refuse_others(path: str) -> None:
    try:
        with open(path, "rb") as opened:
            beginning = opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from None
    for magic, what in _OTHERS.items():
        if beginning.startswith(magic):
            raise ValueError(f"{path} {what}: {_REMEDY}")
    if not beginning.startswith(b"{"):
        what = "is a SentencePiece model" if path.endswith(".model") else "is not JSON"
        raise ValueError(f"{path} {what}: {_REMEDY}")
