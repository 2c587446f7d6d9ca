"""Files: written whole or not at all, read with a limit, and a clear word beforehand if a folder cannot be written."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # of a checkpoint: the names of huggingface_hub
RUN_CONFIG_FILE = "config.yaml"  # of a run: what `routeseg train` was given
RESUME_FILE = "last.ckpt"  # of a run: what it goes on from
SURVEY_FILE = "routes.json"  # of what `routeseg routes` found
SAVING = ".saving-"  # what a folder begins with in which files are written before they are moved
TEMPORARY = re.compile(rf"\.(\d+-[0-9a-f]{{8}}|last\.ckpt)\.tmp|{re.escape(SAVING)}\w+")
MAX_JSON = 1 << 24  # characters of a configuration or a route
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename: the file is there whole or not at all.

    Its folder is made if missing. Raises OSError with the name of the file, also if the disk is full.
    """
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, for whoever writes a file bit by bit: the file gets its own name at the end of
    the block, and is gone if an error ended it. As `write_atomically` otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name())
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name() -> str:
    """Hidden, short and unique: processes on several machines may share a folder, and have the same number."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed left in the folder and in those directly inside. None may be writing."""
    for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def not_written(path: str | Path, error: OSError) -> OSError:
    """An error of the same kind that names the file and, if the disk is full, the remedy."""
    remedy = ": free some space there, or write to another folder" if error.errno in DISK_FULL else ""
    return OSError(error.errno, f"cannot write it, {error.strerror or error}{remedy}", str(path))


def parse_json(text: str | bytes) -> Any:
    """What the text says. Raises ValueError if it is no JSON, too deeply nested, or longer than MAX_JSON."""
    if len(text) > MAX_JSON:
        raise ValueError(f"it has {len(text)} characters, more than any file of ours ({MAX_JSON})")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None


def write_json(path: str | Path, data: Any) -> None:
    """`data` as indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def check_writable(folder: str | Path, option: str = "--output") -> None:
    """Makes the folder. Raises ValueError, naming the option to change, if no file can be written into it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / _temporary_name()
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}. Choose another {option}") from error


def check_run_folder(output: Path, resume: bool) -> None:
    """Raises ValueError for a new run in a folder that holds one, and for one that goes on in a folder that holds
    none."""
    path = output / RESUME_FILE
    if not resume and path.exists():
        raise ValueError(f"{output} already holds a run: go on with it with --resume, or choose another --output")
    if resume and not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist")


def expand_user(path: str | Path) -> Path:
    """The path with `~` and `~name` as folders; with those of unknown users as they are, for they may be names."""
    return Path(os.path.expanduser(path))
