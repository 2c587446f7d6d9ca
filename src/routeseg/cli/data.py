"""The commands about data sets: make-data, download, convert-data, check-data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from routeseg.cli.common import config_parser, fit_crop, leaves_crop, of_folder, options_of, read_data, with_words
from routeseg.cli.options import check_files, progress_bar
from routeseg.cli.parser import USAGE_ERROR, Parser
from routeseg.cli.tables import print_check
from routeseg.data.config import DataConfig, pair
from routeseg.data.pairs import SegmentationData
from routeseg.data.sets.folder import describing_file, write_classes
from routeseg.data.tools.check import SplitCheck, images_to_show, read_to_show
from routeseg.data.tools.convert import Annotations, convert_coco, convert_voc
from routeseg.data.tools.download import SOURCES, download, parse_checksum
from routeseg.data.tools.findings import examine, verdict
from routeseg.data.tools.layouts import LAYOUTS, images_of, write_layout
from routeseg.data.tools.registration import BY_HAND
from routeseg.evaluation import machine_facts
from routeseg.figures import Section, contact_sheet
from routeseg.files import check_writable, expand_user, write_json
from routeseg.labels import default_palette

IMAGES_SHOWN = {"train": 12, "val": 8}  # on the contact sheet


def make_data_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg make-data")
    parser.add_argument("name", type=str, help="scenes")
    parser.add_argument("output", type=str, help="folder to write, new or empty")
    parser.add_argument("--layout", type=str, default="folder", help="folder, camvid, cityscapes, voc, sbd or ade20k")
    parser.add_argument("--train", type=int, default=200, help="training images")
    parser.add_argument("--val", type=int, default=50, help="validation images")
    parser.add_argument("--size", type=tuple[int, int], default=(256, 512), help="[height, width]")
    parser.add_argument("--preset", type=str, default="varied", help="large, small, mixed, or varied: these in turn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(list(words))
    if args.name != "scenes":
        raise ValueError(f"cannot make {args.name!r}: choose scenes")

    if args.layout not in LAYOUTS:
        raise ValueError(f"no layout {args.layout!r}: choose one of {', '.join(LAYOUTS)}")
    config = DataConfig(image_size=args.size, preset=args.preset, train_images=args.train, val_images=args.val)
    with progress_bar("make-data", images_of(args.layout, config)) as step:
        write_layout(args.layout, Path(args.output), config, args.seed, step)
    name, options = ("voc", " --data.train_split train_aug") if args.layout == "sbd" else (args.layout, "")
    print(f"{args.output}: {args.train} training and {args.val} validation images in the layout {args.layout}")
    print(f"train on them with --data.name {name} --data.root {args.output}{options}")
    return 0


def download_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg download")
    parser.add_argument("name", type=str, help=f"{', '.join(SOURCES)}; or {', '.join(BY_HAND)}, for what to do by hand")
    parser.add_argument("folder", type=str, help="where the data sets lie, each in its own folder below it")
    parser.add_argument(
        "--url", type=str, default=None, help="another address of the same file; its checksum is checked"
    )
    parser.add_argument("--checksum", type=str, default=None, help="another one, ALGORITHM:HEX; or none")
    parser.add_argument("--keep_archive", type=bool, default=False, help="leave the archive in the folder")
    args = parser.parse_args(list(words))
    if args.name in BY_HAND:
        print(BY_HAND[args.name])
        return USAGE_ERROR
    if args.name not in SOURCES:
        raise ValueError(f"no data set {args.name!r} to download: choose one of {', '.join((*SOURCES, *BY_HAND))}")
    source = SOURCES[args.name]
    if args.url is not None:
        source = replace(source, url=args.url)
    if args.checksum is not None:
        source = replace(source, checksum=parse_checksum(args.checksum))
    with byte_bars() as bar:
        download(
            source,
            Path(args.folder),
            keep_archive=args.keep_archive,
            say=lambda text: print(f"{args.name}: {text}", flush=True),
            on_bytes=bar("downloading"),
            on_unpacked=lambda written: bar("unpacking")(written, None),
        )
    print(f"train on it with {source.train_with.format(root=args.folder)}")
    return 0


def convert_data_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg convert-data")
    parser.add_argument("format", type=str, help="coco: ANNOTATIONS.json OUT --images DIR, or voc: EXPORT")
    parser.add_argument("source", type=str, help="coco: the JSON of the annotations; voc: the folder of the export")
    parser.add_argument("output", type=str | None, nargs="?", default=None, help="coco: folder to write, new or empty")
    parser.add_argument("--images", type=str | None, default=None, help="where the images lie; voc: else JPEGImages")
    parser.add_argument("--val", type=str | None, default=None, help="coco: the JSON of the validation images")
    parser.add_argument("--val_images", type=str | None, default=None, help="coco: where those lie; else in --images")
    parser.add_argument(
        "--background", type=str, default="class", help="pixels of no object: class (the first one), or ignore"
    )
    args = parser.parse_args(list(words))
    if args.background not in ("class", "ignore"):
        raise ValueError(f"--background is {args.background!r}: choose class or ignore")

    keep = args.background == "class"
    if args.format == "voc":
        if args.output or args.val or args.val_images:
            raise ValueError("voc writes a classes.yaml into the export: give its folder, and no more than --images")
        written = convert_voc(Path(args.source), args.images, keep)
    elif args.format == "coco":
        if args.output is None or args.images is None:
            raise ValueError("coco needs three things: give the JSON, the folder to write, and --images DIR")
        if args.val_images is not None and args.val is None:
            raise ValueError(
                "--val_images only applies to --val, the JSON of the validation images: add that, or leave it out"
            )
        parts = {"train": Annotations(Path(args.source), Path(args.images))}
        if args.val is not None:
            parts["val"] = Annotations(Path(args.val), Path(args.val_images or args.images))
        with progress_bar("convert-data", sum(len(part) for part in parts.values())) as step:
            written = convert_coco(parts, Path(args.output), keep, step)
    else:
        raise ValueError(f"no format {args.format!r}: choose coco or voc")
    for line in written.notes:
        print(f"note: {line}")
    print(f"{written.path}: {len(written.names)} classes, {', '.join(written.names)}")
    print(f"look it over with routeseg check-data {written.path.parent}")
    return 0


def check_data_command(words: Sequence[str]) -> int:
    """`routeseg check-data FOLDER ...` is short for a preset and the layout of the folder, as in `train FOLDER`."""
    parser = config_parser("check-data", ["data"])
    parser.usage = "routeseg check-data FOLDER [options], or routeseg check-data --config PRESET [options]"
    parser.add_argument("--split", type=str, action="append", help="may be given again; else the configuration's")
    parser.add_argument("--json", type=str | None, default=None, help="also write all that was found to this file")
    parser.add_argument(
        "--output", type=str, default="runs/check", help="folder for contact_sheet.png; none is overwritten"
    )
    parser.add_argument("--workers", type=int | None, default=None, help="processes that read files; 1: this one")
    parser.add_argument(
        "--write_classes", action="store_true", help="write the classes that the masks tell to classes.yaml, to edit"
    )
    folder, given = bool(words) and not words[0].startswith("-"), options_of(words)
    args, data = read_data(parser, with_words(of_folder(words[0], given), words[1:]) if folder else words, lenient=True)
    if not folder and not any(name.startswith(("config", "data.")) for name in given):
        raise ValueError(
            "nothing to check: give the folder of your images, as in `routeseg check-data my`, or a preset, as in "
            "`routeseg check-data --config scenes/small`"
        )
    if folder and leaves_crop(given):
        with suppress(ValueError):  # the report tells it
            data = fit_crop(data, args.seed)

    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers is {args.workers}: it must not be negative")
    if args.write_classes:
        print(f"{_write_classes(data)}: written; put names of your own there")
    check_writable(args.output)
    check_files(args, "json")
    splits = args.split or (data.train_split, data.val_split)
    examined = examine(data, splits, args.seed, args.workers, progress_bar)
    checks, findings = examined.checks, examined.findings
    print_check(checks, findings, pair(data.crop))
    sheet = _draw_contact_sheet(Path(args.output), data, checks, examined.opened)
    if sheet is not None:
        print(f"{sheet}: some images with their labels, look whether they fit")
    if args.json is not None:
        found = {
            "verdict": verdict(findings),
            "findings": [vars(finding) for finding in findings],
            "splits": {check.split: check.as_dict() for check in checks},
            "data": vars(data),
            "contact_sheet": None if sheet is None else str(sheet),
            "command": ["check-data", *words],
        }
        write_json(Path(args.json), found | machine_facts())
    return USAGE_ERROR if verdict(findings) == "errors" else 0


def _write_classes(data: DataConfig) -> Path:
    """Writes the classes that the masks tell to the classes.yaml of the folder. Raises ValueError if there are none."""
    if data.name != "folder" or data.root is None:
        raise ValueError("--write_classes is for a folder of your own images (data.name folder): leave it out")
    path = describing_file(expand_user(data.root))
    if path.is_file():
        raise ValueError(f"{path} is there already: edit it, or remove it to have it written anew")
    if data.classes is None:
        raise ValueError(f"the masks tell no classes for {path}: leave out --write_classes to see why")
    write_classes(path, **{"palette": None} | data.classes)
    return path


def _draw_contact_sheet(
    output: Path, data: DataConfig, checks: Sequence[SplitCheck], opened: Mapping[str, SegmentationData]
) -> Path | None:
    """Images of each split, in a file of a new name; None if no image could be read."""
    sections = []
    for check in (check for check in checks if check.counted):
        shown = images_to_show(check, IMAGES_SHOWN["train" if check.training else "val"])
        tiles = [(check.images[k].name, *read_to_show(opened[check.split], k)) for k in shown]
        sections.append(Section(f"{check.split}: {len(shown)} of {len(check.images)} images", tiles))
    if not sections:
        return None
    counted = [check for check in checks if check.counted]
    classes, pixels = counted[0].classes, np.sum([check.pixels[:-1] for check in counted], axis=0)
    path = _new_file(output, "contact_sheet", ".png")
    title = f"{' '.join(filter(None, (data.name, data.root)))}: images and their labels"
    palette = classes.palette or default_palette(classes.names)
    contact_sheet(path, title, sections, classes.names, palette, pixels / max(pixels.sum(), 1))
    return path


def _new_file(folder: Path, name: str, suffix: str) -> Path:
    """An empty file of this name or, if it is there already, of the next number: also if two processes ask at once."""
    for number in itertools.count(1):
        path = folder / f"{name}{f'_{number}' if number > 1 else ''}{suffix}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


@contextmanager
def byte_bars() -> Iterator[Callable[[str], Callable[[int, int | None], None]]]:
    """Bars that count bytes, on a terminal: of a title, a function of (done, total or None). They go at the end."""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def bar(title: str) -> Callable[[int, int | None], None]:
            def update(done: int, total: int | None) -> None:
                if title not in tasks:
                    tasks[title] = progress.add_task(title, total=None)
                progress.update(tasks[title], completed=done, total=total)

            return update

        yield bar
