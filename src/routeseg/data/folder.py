"""The `folder` layout, for your own pictures.

ROOT/classes.yaml                 names: [...]; optional: palette: [[r,g,b], ...], mapping: {value: class, ...}
ROOT/images/{train,val}/NAME.*    RGB pictures (.png or .jpg)
ROOT/masks/{train,val}/NAME.png   one byte a pixel: the class, 255 = ignored
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from routeseg.data.pairs import Classes, LabelMap, PairedFiles, pair_folders
from routeseg.data.transforms import IGNORE


def open_folder(root: Path, split: str) -> PairedFiles:
    """A split of the `folder` layout (see the top of this file)."""
    classes, mapping = read_classes(root / "classes.yaml")
    pairs = pair_folders(root / "images" / split, root / "masks" / split)
    return PairedFiles(pairs, classes, LabelMap(len(classes), mapping, {}))


def read_classes(path: Path) -> tuple[Classes, dict[int, int]]:
    """`names`, and optionally `palette` and `mapping`, of a classes.yaml. Raises ValueError where it has none."""
    if not path.is_file():
        raise ValueError(f"no file {path}: it names the classes, for example\n  names: [road, car]")
    try:
        data = yaml.safe_load(path.read_text())
        names = tuple(str(name) for name in data["names"])
        palette = tuple((int(r), int(g), int(b)) for r, g, b in data["palette"]) if data.get("palette") else None
        mapping = {int(value): int(target) for value, target in (data.get("mapping") or {}).items()}
        if len(names) > IGNORE:
            raise ValueError(f"{len(names)} names: a label map holds at most {IGNORE} classes")
        if palette is not None and len(palette) != len(names):
            raise ValueError(f"the palette has {len(palette)} colours for {len(names)} names")
        if palette is not None and not all(0 <= part <= 255 for colour in palette for part in colour):
            raise ValueError("colours are three numbers from 0 to 255")
        wrong = [target for target in mapping.values() if target != IGNORE and not 0 <= target < len(names)]
        if wrong:
            raise ValueError(
                f"the mapping leads to {wrong[0]}, classes are 0 to {len(names) - 1}, or {IGNORE} to ignore"
            )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not describe classes ({error}): expected `names: [road, car]`") from error
    return Classes(names, palette), mapping


def write_classes(path: Path, names: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
    """The inverse of `read_classes`."""
    path.write_text(yaml.safe_dump({"names": list(names), "palette": [list(map(int, c)) for c in palette]}))
