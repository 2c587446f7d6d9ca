"""What several rooms say, or ask, when something goes wrong."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DIVERGED = "the outputs hold NaN or infinite values: the network that made them has diverged"
NOT_FINITE = "the images contain NaN or infinite values: give RGB, uint8 or float in 0..1"
OUT_OF_MEMORY = ("out of memory", "allocate memory", "Insufficient memory")  # a GPU says so, a CPU, OpenCV
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")  # what a terminal obeys, or ends a line at

NO_PLACES = "the places of this network do not leave by themselves. Train one with --model.place 32"
NOT_CALIBRATED = "the network was not calibrated, so it knows no budget: run `routeseg calibrate`"
NO_EXITS = "this network takes no budget: it has no exits. Train one with --model.exits"


class BudgetNotKept(ValueError):
    """A network cannot keep a budget, for images of this size."""


class NotExportable(ValueError):
    """A part of a network has no export."""


def printable(text: str) -> str:
    """The text with its control characters as escapes, such as \\x1b, but for the ends of lines."""
    return CONTROL.sub(lambda found: found[0] if found[0] == "\n" else ascii(found[0])[1:-1], text)


def lacks_memory(error: Exception) -> bool:
    """Whether this says that an image is too large for the memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def require(module: str, extra: str, user: str) -> Any:
    """The module, imported. Raises ValueError, which names the extra of routeseg, if it is not installed.

    user  what needs it, such as "`routeseg export`"
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{user} needs the package {package} ({error}): {how_to_install(extra)}") from error


def how_to_install(extra: str) -> str:
    """The command that brings an extra: of the sources that this package was installed from, if it was."""
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        origin = json.loads(distribution("routeseg").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    url = str(origin.get("url", ""))
    if "dir_info" not in origin or not url.startswith("file://"):
        return f'pip install "routeseg[{extra}]"'
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f'pip install {editable}"{url2pathname(urlsplit(url).path)}[{extra}]"'


@contextmanager
def only_warned_of(what: str) -> Iterator[None]:
    """For what is only to be looked at, such as an image of a run: an error in this block is one line on the log."""
    try:
        yield
    except Exception as error:  # a full disk, too little memory, a file that is gone, a mistake in the drawing
        warn_of(what, error)


def warn_of(what: str, error: Exception) -> None:
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    line = " ".join(reason.split()) or type(error).__name__
    logging.getLogger("routeseg").warning("no %s: %s", what, line)
