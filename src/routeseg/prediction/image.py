"""What a network made of an image, in Python: `SegmentedImage`. It comes from a `Segmenter` (segmenter.py).

Legend: B images, H, W image size, K classes, L depth, S scales.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from routeseg import figures
from routeseg.budgets.asked import in_words, levels
from routeseg.description import NetworkDescription
from routeseg.files import check_writable, expand_user, write_atomically
from routeseg.prediction.files import GIGA, Segmented, Target, class_shares, effort_of, write_results
from routeseg.prediction.sources import open_folder
from routeseg.space import Route

MS = 1000.0


@dataclass(frozen=True)
class SegmentedImage:
    """What a network made of one image. In a notebook it shows itself.

    image         uint8 [H,W,3], RGB
    labels        the class of each pixel, uint8 [H,W]; uint16 for more than 256 classes
    gates         what it opened, float32 [L+1,S,3]
    milliseconds  that the network took, without reading the image
    network       the network, without its weights; `precision` it computed in
    """

    image: np.ndarray
    found: Segmented
    network: NetworkDescription
    precision: str

    @property
    def labels(self) -> np.ndarray:
        return self.found.labels

    @property
    def gates(self) -> np.ndarray:
        return self.found.gates

    @property
    def milliseconds(self) -> float:
        return MS * self.found.seconds

    @property
    def name(self) -> str:
        """Of its file, without the suffix; or `image`."""
        return self.found.prediction.name

    @property
    def class_names(self) -> Sequence[str]:
        """K names."""
        return self.network.config.class_names

    @property
    def palette(self) -> Any:
        """The RGB colours of the classes."""
        return self.network.config.palette

    @property
    def cost_gmacs(self) -> float:
        """Multiply-accumulates of the paths that ran, in 10^9."""
        return self.found.prediction.cost_macs / GIGA

    @property
    def full_gmacs(self) -> float:
        """Those of all paths, at this size."""
        return self.found.prediction.full_macs / GIGA

    @property
    def levels(self) -> tuple[float, ...]:
        """What an image of this size can cost, as shares of the full network, ascending: one for each exit of the
        network. A budget between two of them is kept in the mean of many images. Empty for a network without exits, and
        for one whose places leave by themselves."""
        if self.network.config.exits is None or self.network.config.place is not None:
            return ()
        return tuple(levels(self.network, self.found.prediction.size).tolist())

    @property
    def shares(self) -> dict[str, float]:
        """The classes that are there, the largest first, and their share of the pixels."""
        return class_shares(self.labels, self.class_names)

    @property
    def route(self) -> Route:
        """The paths that were open."""
        return Route.from_gates(self.network.config.space, self.gates)

    @property
    def seen(self) -> tuple[int, int]:
        """(height, width) at which the network looked at the image: a budget may choose a smaller size than its own, or
        a larger one."""
        return self.found.seen or self.found.prediction.size

    @property
    def exits(self) -> np.ndarray | None:
        """Of a network whose places leave by themselves: the exit of each, int64 [h/b,w/b] (rounded up), at the size
        `seen`."""
        return self.found.exits

    def effort(self, legend: bool = True) -> Image.Image:
        """How far each place of the image went, as a heat map over it. Raises ValueError, with the remedy, if its
        places did not decide."""
        shares, place = effort_of(self.network, self.found), self.network.config.place
        assert place is not None
        return Image.fromarray(figures.effort(self.image, shares, place, legend, self.found.seen))

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The image tinted with its segmentation; `figures.overlay` says more."""
        return Image.fromarray(
            figures.overlay(self.image, self.labels, self.class_names, self.palette, alpha, legend=legend)
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Writes what `routeseg predict` writes of an image: NAME_labels.png, NAME_overlay.png, NAME_route.png and
        NAME_route.json. The name of an image file, such as photo.png, gets the overlay alone. Returns what was written.

        Raises ValueError if it cannot be written."""
        ending = Path(folder).suffix.lower()
        if ending and ending in Image.registered_extensions() and not Path(folder).is_dir():
            return [self._save_overlay(expand_user(folder), Image.registered_extensions()[ending])]
        target = Target(open_folder(Path(folder)), True, self.network.fingerprint)
        target.folder.prepare()
        endings = write_results(target, self.network, self.found, self.image, self.precision)
        return [Path(folder) / f"{self.name}{ending}" for ending in endings]

    def _save_overlay(self, path: Path, form: str) -> Path:
        check_writable(path.parent)
        picture = io.BytesIO()
        try:
            self.overlay().save(picture, form)
        except (KeyError, OSError, ValueError) as error:  # Pillow cannot write this kind of file
            raise ValueError(f"cannot write {path} ({error}): name a .png or .jpg") from error
        write_atomically(path, picture.getvalue())
        return path

    def _repr_png_(self) -> bytes:
        return figures.png_bytes(self.overlay())

    def __repr__(self) -> str:
        height, width = self.labels.shape
        share = 100 * self.found.prediction.share
        classes = ", ".join(f"{name} {100 * part:.0f} %" for name, part in list(self.shares.items())[:4])
        steps = f" (it can be {in_words(np.array(self.levels))})" if self.levels else ""
        return (
            f"SegmentedImage({self.name!r}, {width}x{height}: {classes}; {self.cost_gmacs:.3g} GMACs, {share:.0f} % of "
            f"the network{steps}, {self.milliseconds:.0f} ms)"
        )
