"""Calibrate."""

from __future__ import annotations

from jsonargparse import Namespace

from routeseg.budgets.calibration import calibrate, with_sizes
from routeseg.cli.options import progress_bar
from routeseg.cli.tables import print_exits
from routeseg.data.config import DataConfig
from routeseg.data.loaders import evaluation_loader
from routeseg.data.pairs import SegmentationData
from routeseg.data.subset import OFFSET_IMAGES, evenly_spread
from routeseg.model import DynamicRoutingNetwork
from routeseg.training.offsets import fit_offsets, shift


def run_calibrate(
    args: Namespace,
    data: DataConfig,
    images: SegmentationData,
    others: SegmentationData,
    model: DynamicRoutingNetwork,
) -> int:
    if args.sizes is not None:
        model = with_sizes(model, args.sizes)
    if args.class_offsets:
        some = evenly_spread(images, min(args.images, OFFSET_IMAGES))
        with progress_bar("fit offsets", len(some)) as step:
            offsets = fit_offsets(model, evaluation_loader(some, data.workers), step)
        shift(model, offsets)
        for name, offset in zip(images.classes.names, offsets[-1].tolist() if offsets else [], strict=False):
            print(f"{name}: {offset:+.1f}")
    if model.exits is not None or not args.class_offsets:
        with progress_bar(f"calibrate {data.name}", len(images) + len(others)) as step:
            labelled, budgets = (evaluation_loader(some, data.workers) for some in (images, others))
            count = calibrate(model, labelled, budgets, step, walked=len(others))
        print_exits(model)
        with_labels = f" with {count} images" if count else ""  # a rule that is not fitted reads no labels
        print(f"calibrated{with_labels}: ask for a budget with --budget")
    model.save(args.checkpoint)
    print(f"{args.checkpoint} is changed: it keeps what was fitted here in place of what it had")
    return 0
