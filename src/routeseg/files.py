"""Files: written whole or not at all, read with a limit, and a clear word beforehand if a folder cannot be written."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # of a checkpoint: the names of huggingface_hub
RUN_CONFIG_FILE = "config.yaml"  # of a run: what `routeseg train` was given
RESUME_FILE = "last.ckpt"  # of a run: what it goes on from
BUNDLED = Path(__file__).parent / "pretrained"
SURVEY_FILE = "routes.json"  # of what `routeseg routes` found
SAVING = ".saving-"  # what a folder begins with in which files are written before they are moved
TEMPORARY = re.compile(rf"\.(\d+-[0-9a-f]{{8}}|last\.ckpt)\.tmp|{re.escape(SAVING)}\w+")
MAX_JSON = 1 << 24  # characters of a configuration or a route
MAX_YAML_NODES = 20_000  # values of a configuration, each alias written out
MAX_READ_BYTES, MAX_READ_SECONDS = 400_000_000, 60.0  # of a file or a URL, unless told otherwise
BLOCK_BYTES = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STDERR = threading.Lock()  # only one thread at a time may turn it away


def sample() -> Path:
    """An image to try a network on: a street, drawn as `routeseg.data.scenes` draws it."""
    return Path(__file__).parent / "street.jpg"


@cache
def bundled_networks() -> Mapping[str, Path]:
    """The networks that come with the package, name -> folder; benchmarks/ship.py makes them. Looked up once: every
    word of a long list of images is asked whether it is one."""
    return {file.parent.name: file.parent for file in sorted(BUNDLED.glob(f"*/{CONFIG_FILE}"))}


def best_of_run(word: str | Path) -> str:
    """The folder of the network that a word names: a run stands for its best network, or for its last one as long as
    there is no other; its last.ckpt for its last one; weights, and the config beside them, for their folder; the name
    of a bundled network for that, unless something of this name is here. Any other word stands for itself."""
    path, names = Path(word), ["best", "last"]
    if path.is_file() and path.name in (WEIGHTS_FILE, CONFIG_FILE, RESUME_FILE):
        path, names = path.parent, ["last"] if path.name == RESUME_FILE else []
    if (path / CONFIG_FILE).is_file():
        return str(path)
    if not path.exists() and (bundled := bundled_networks().get(str(word))):
        return str(bundled)
    return next((str(path / name) for name in names if (path / name / CONFIG_FILE).is_file()), str(word))


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


def read_up_to(file: IO[bytes], limit: int = MAX_READ_BYTES) -> bytes:
    """What an open file holds. Raises OSError if that is more than `limit` bytes, or takes over MAX_READ_SECONDS."""
    blocks, left, end = list[bytes](), limit, time.monotonic() + MAX_READ_SECONDS
    while block := file.read(min(BLOCK_BYTES, left + 1)):
        left -= len(block)
        if left < 0:
            raise too_large(limit)
        if time.monotonic() > end:
            raise too_slow()
        blocks.append(block)
    return b"".join(blocks)


def read_file(path: str | Path, limit: int = MAX_READ_BYTES) -> bytes:
    """`read_up_to` of a path."""
    with open(path, "rb") as file:
        return read_up_to(file, limit)


def too_large(limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {limit / 1e6:.4g} MB, the most that is read")


def too_slow() -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, f"it did not come within {MAX_READ_SECONDS:g} s")


def parse_json(text: str | bytes, limit: int = MAX_JSON) -> Any:
    """What the text says. Raises ValueError if it is no JSON, too deeply nested, longer than `limit`, or holds a number
    that is not finite or beyond 64 bits."""
    if len(text) > limit:
        raise ValueError(f"it has {len(text)} characters, more than any file of ours ({limit})")
    try:
        return json.loads(text, parse_int=_whole_number, parse_float=_finite_number, parse_constant=_finite_number)
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None


def compose_yaml(text: str) -> Any:
    """The nodes of a YAML text, as `yaml.compose` gives them. Raises ValueError if it is none, is too deeply nested, or
    has more than MAX_YAML_NODES values once its aliases are written out."""
    import yaml

    sizes: dict[int, float] = {}  # by the identity of a node; infinite while it is inside itself

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = itertools.chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and size(node) > MAX_YAML_NODES:
            raise ValueError(f"it has more than {MAX_YAML_NODES} values, with its aliases written out")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None
    return node


def parse_yaml(text: str) -> Any:
    """What the text says. Raises ValueError as `compose_yaml` does."""
    import yaml

    node = compose_yaml(text)
    try:
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _finite_number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _whole_number(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"{text[:20]}... is too large a number")
    return value


def read_json(path: str | Path) -> Any:
    """`parse_json` of a file. Raises OSError, too, if it cannot be read or is longer than MAX_JSON."""
    return parse_json(read_file(path, MAX_JSON))


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


@contextmanager
def silent_stderr() -> Iterator[None]:
    """In this block, what C and C++ code writes to stderr goes nowhere. Errors still come as Python's."""
    with _STDERR:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)
