"""Draws how far the places of images go: an image, its labels, and the effort at some budgets, in a row.

python benchmarks/effort_figure.py bundled results/effort.png
python benchmarks/effort_figure.py runs/my/best effort.png --images a.jpg b.jpg --budgets 30% 50% --mean

With --mean a budget is one of the mean over many images, so that hard images spend more; else each image spends it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

import routeseg
from routeseg import figures
from routeseg.figures.common import INK
from routeseg.figures.words import text_font

HEIGHT, GAP, TEXT = 240, 8, 15  # pixels


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a checkpoint folder, or `bundled`")
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", nargs="*", default=[routeseg.sample()], help="by default the street of the package")
    parser.add_argument("--mean", action="store_true")
    parser.add_argument("--budgets", nargs="*", default=["30%", "50%", "70%"])
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    model = routeseg.load(None if args.network == "bundled" else args.network)
    rows = [row(model, image, args.budgets, not args.mean) for image in args.images]
    canvas = Image.new("RGB", (max(one.width for one in rows), len(rows) * rows[0].height), "white")
    for number, one in enumerate(rows):
        canvas.paste(one, (0, number * one.height))
    args.output.write_bytes(figures.png_bytes(canvas))
    return 0


def row(model: routeseg.Segmenter, image: str | Path, budgets: list[str], per_image: bool) -> Image.Image:
    whole = model.predict(image)
    pictures = {"the image": whole.image, "all of the network": np.asarray(whole.overlay(legend=False))}
    for budget in budgets:
        found = model.predict(image, budget=budget, per_image=per_image)
        share, differs = found.found.prediction.share, float((found.labels != whole.labels).mean())
        heat = found.effort(legend=False) if found.exits is not None else Image.fromarray(found.image)
        words_of = f"{100 * share:.0f} % of its cost, other labels in {100 * differs:.1f} %"
        pictures[words_of] = np.asarray(heat)
    width = round(HEIGHT * whole.image.shape[1] / whole.image.shape[0])
    canvas = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, HEIGHT + 2 * TEXT), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, picture) in enumerate(pictures.items()):
        left = number * (width + GAP)
        canvas.paste(Image.fromarray(cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA)), (left, 0))
        draw.text((left, HEIGHT + TEXT // 3), title, fill=INK, font=text_font(TEXT))
    return canvas


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
