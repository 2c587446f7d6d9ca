"""Writing files: whole or not at all, and a clear word beforehand where a folder cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename: the file is there whole or not at all.

    Its folder is made where missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """`data` as indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def check_writable(folder: str | Path, option: str = "--output") -> None:
    """Makes the folder. Raises ValueError, naming the option to change, where no file can be written into it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}. Choose another {option}") from error
