"""CamVid split by where its frames are from: a folder of links in which one drive, or the last third of each, is held
out for validation, and the rest, of both splits, is for training.

    python benchmarks/drives.py CAMVID 0006R0 FOLDER
    python benchmarks/drives.py CAMVID ends FOLDER

Drives are 0001TP (at dusk), 0006R0 and 0016E5; a frame's name begins with its own, and its number follows. Validation
frames of the usual split are seven seconds of a drive of which the rest is trained on, and score up to ten points more
than other streets. One in 15 of them is taken here, as far apart as the others are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SPLITS = ("train", "val")
ENDS, SHARE = "ends", 2 / 3  # of a drive's frames that come before its end
DENSER = 15  # times as many frames a second has the usual validation as the training


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("held_out", help=f"a drive, or `{ENDS}`: the last third of each")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(words)
    drives: dict[str, list[tuple[str, Path]]] = {}
    for split in SPLITS:
        some = sorted((args.camvid / split).glob("*_*.*"))
        for file in some if split == "train" or args.held_out != ENDS else some[::DENSER]:
            drives.setdefault(file.name.partition("_")[0], []).append((split, file))
    if args.held_out not in {*drives, ENDS}:
        known = ", ".join(sorted(drives))
        print(f"drives: error: {args.camvid} has no frame of {args.held_out}; it has {known}", file=sys.stderr)
        return 2
    count = dict.fromkeys(SPLITS, 0)
    for drive, frames in drives.items():
        trained = [file.name for split, file in frames if split == "train"]
        end = trained[round(SHARE * len(trained))]
        for split, file in frames:
            to = SPLITS[file.name >= end if args.held_out == ENDS else drive == args.held_out]
            count[to] += 1
            for kind, source in (("", file), ("annot", args.camvid / f"{split}annot" / f"{file.stem}.png")):
                link = args.folder / f"{to}{kind}" / source.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(source.resolve())
    print(f"{args.folder}: {count['train']} frames for training, {count['val']} ({args.held_out}) for validation")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
