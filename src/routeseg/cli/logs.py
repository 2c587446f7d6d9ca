"""What is said on stderr while a command runs, and what is not."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from routeseg.errors import printable


def quiet_libraries() -> None:
    """Silences remarks of libraries that no user can act on; to be called once they are imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.|lightning_utilities\.")


class _Plain(logging.Formatter):
    """Lines without control characters, which a file name may have."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """What the package logs, such as unreadable images that are skipped, goes to stderr: a line each.

    Loader processes inherit it. It is the stream of this moment, not one that a progress bar puts in its place.
    """
    log, stream = logging.getLogger("routeseg"), sys.stderr
    over_a_bar = "\r\x1b[K" if stream.isatty() else ""  # back to the line's start, and erase the bar that stands there
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Plain(over_a_bar + "routeseg: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
