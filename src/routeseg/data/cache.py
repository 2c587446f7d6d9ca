"""Decoded images on disk: a large PNG takes tens of milliseconds to decode, its pixels a few to read back."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np

from routeseg.data.decoding import UnreadableImage, read_image
from routeseg.files import check_writable, write_atomically

SPARE_BYTES = 2 << 30  # of the disk stay free for others, such as checkpoints
FORMAT = "2"  # counts up when the same file is decoded to other pixels


class ImageCache:
    """Reads images as `read_image` does, and keeps their pixels in a folder for the next time.

    Pixels are mapped into memory: only the rows of a crop are read, and all loader processes share what the system
    keeps in memory. An image that changes (its path, size or time) is decoded anew. Processes and runs may share a
    folder; nothing is ever removed from it. If the disk gets full, images are decoded each time.
    Raises ValueError if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        check_writable(folder, "--data.cache")
        self.folder, self.writes = folder, True

    def __call__(self, path: Path) -> np.ndarray:
        """uint8 [H,W,3] RGB, not to be written to. Raises UnreadableImage as `read_image` does."""
        try:
            file = self._file(path)
        except OSError as error:
            raise UnreadableImage(f"cannot read {path} as an image: {error}") from error
        try:
            return np.asarray(np.load(file, mmap_mode="r"))
        except (OSError, ValueError, EOFError):  # not there, or damaged
            image = read_image(path)
        if self.writes:
            self._keep(file, image)
        return image

    def _file(self, path: Path) -> Path:
        facts = path.stat()
        key = "\0".join((FORMAT, os.path.abspath(path), str(facts.st_size), str(facts.st_mtime_ns)))
        digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        return self.folder / digest[:2] / f"{digest}.npy"

    def _keep(self, file: Path, image: np.ndarray) -> None:
        try:
            if shutil.disk_usage(self.folder).free < image.nbytes + SPARE_BYTES:
                raise OSError(f"less than {SPARE_BYTES / 2**30:.0f} GB are free")
            data = io.BytesIO()
            np.save(data, image)
            write_atomically(file, data.getvalue())
        except OSError as error:
            self.writes = False
            logging.getLogger("routeseg").warning(
                "no more images are kept in the cache %s: %s. Training goes on, slower", self.folder, error
            )
