"""A file that is there whole or not at all, whatever ends the process that writes it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Optional

__all__ = ["copy_owner_and_mode", "replace_file", "write_and_close"]


def replace_file(target: Path, content: bytes, like: Optional[os.stat_result] = None) -> None:
    """Writes a file, in place of one that is there.

    Args:
        like: whose owner and mode it gets; without it, it is for its owner only (0600).

    Raises:
        OSError: it cannot be written; then what was there still is.
    """
    # mkstemp's files are 0600.
    descriptor, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        write_and_close(descriptor, content)
        if like is not None:
            copy_owner_and_mode(Path(draft), like)
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def copy_owner_and_mode(path: Path, like: os.stat_result) -> None:
    """Gives a file the owner, where that is allowed, and the mode of another."""
    if hasattr(os, "chown"):
        with contextlib.suppress(PermissionError):
            os.chown(path, like.st_uid, like.st_gid)
    os.chmod(path, stat.S_IMODE(like.st_mode))


def write_and_close(descriptor: int, content: bytes) -> None:
    """Writes to an open file down to the disk, and closes it."""
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
