"""CamVid with a drive held out: a folder of links in which the frames of one drive are for validation, and those of the
others, of both splits, for training.

    python benchmarks/drives.py CAMVID 0006R0 FOLDER

Drives are 0001TP (at dusk), 0006R0 and 0016E5; a frame's name begins with its own. Validation frames of the usual split
are of a drive that is trained on, and score up to ten points more than those of another.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SPLITS = ("train", "val")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("drive")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(words)
    frames = {split: sorted((args.camvid / split).glob("*_*.*")) for split in SPLITS}
    if not any(file.name.startswith(args.drive) for files in frames.values() for file in files):
        drives = sorted({file.name.partition("_")[0] for files in frames.values() for file in files})
        print(f"drives: error: {args.camvid} has no frame of {args.drive}; it has {', '.join(drives)}", file=sys.stderr)
        return 2
    count = dict.fromkeys(SPLITS, 0)
    for split, files in frames.items():
        for file in files:
            to = SPLITS[file.name.startswith(args.drive)]
            count[to] += 1
            for kind, source in (("", file), ("annot", args.camvid / f"{split}annot" / f"{file.stem}.png")):
                link = args.folder / f"{to}{kind}" / source.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(source.resolve())
    print(f"{args.folder}: {count['train']} frames for training, {count['val']} of {args.drive} for validation")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
