"""What is wrong with a data set, each with its remedy, and whether it is ready to train on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from routeseg.data.config import DataConfig, open_data, pair
from routeseg.data.label_files import LabelMap
from routeseg.data.pairs import LeftOut, PairedFiles, SegmentationData
from routeseg.data.sets.folder import describing_file
from routeseg.data.sets.masks import IGNORED_16, LOOSE, RARE_VALUE, white_alone
from routeseg.data.tools.check import CheckedImage, SplitCheck, check_split, duplicates
from routeseg.files import expand_user
from routeseg.labels import IGNORE, Classes

MOSTLY = 0.99  # share of the labelled pixels above which a class leaves the others hardly a chance
MOSTLY_IGNORED = 0.8
MOSTLY_UNREADABLE = 0.5
RARE_CLASS = 0.1  # of an equal share of the labelled pixels: below it a class is rare
BALANCE = 0.5  # recipe.class_balance to try with rare classes (docs/results.md compares it with 1)
NEAR_COLOURS = 2  # steps of a channel, by which one colour becomes another one by mistake
LONGEST_MAPPING = 40  # entries that a remedy writes out
SMALLEST = 32  # pixels, the least side of an image that the network takes
VERDICTS = {
    "ready": "ready: nothing stands against training on it",
    "warnings": "ready, with warnings: it can be trained on; see what is said above",
    "errors": "not ready: mend what is marked as an error above first",
}


@dataclass(frozen=True)
class Finding:
    """Something wrong: an `error` ends a training or makes it pointless, a `warning` makes it worse. A `note` is not
    wrong, and may help.

    files  the files or images that it is about, all of them
    """

    level: Literal["error", "warning", "note"]
    text: str
    remedy: str
    files: tuple[str, ...] = ()


def verdict(findings: Sequence[Finding]) -> str:
    """A key of VERDICTS."""
    levels = {finding.level for finding in findings}
    return "errors" if "error" in levels else "warnings" if "warning" in levels else "ready"


@dataclass(frozen=True)
class Examined:
    """What was found in the splits of a data set.

    opened  those that could be opened, by name
    """

    checks: list[SplitCheck]
    opened: dict[str, SegmentationData]
    findings: list[Finding]


def examine(
    data: DataConfig,
    splits: Iterable[str],
    seed: int,
    workers: int | None,
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]],
) -> Examined:
    """Looks at every image of some splits: what `routeseg check-data` tells, and `routeseg train` before it trains.

    workers   as `check_split` takes them
    progress  of a title and a number of images, a context that gives what is called after each (a progress bar)
    Raises ValueError if none of the splits can be opened, for one reason.
    """
    checks: list[SplitCheck] = []
    opened: dict[str, SegmentationData] = {}
    for split in dict.fromkeys(splits):
        training, left_out = split == data.train_split, list[LeftOut]()
        try:
            opened[split] = open_data(data, split, seed, left_out)
        except ValueError as error:
            checks.append(SplitCheck(split, Classes(()), [], training, str(error), left_out))
            continue
        with progress(f"check {data.name} {split}", len(opened[split])) as step:
            checks.append(check_split(opened[split], split, training, workers, step, left_out))
    if not opened and len({check.failure for check in checks}) == 1:  # there is no such data set
        raise ValueError(checks[0].failure)
    label_map = next((files.label_map for files in opened.values() if isinstance(files, PairedFiles)), None)
    described_in = describing_file(expand_user(data.root)) if data.name == "folder" and data.root else None
    if described_in is not None and not described_in.is_file():
        described_in = None
    return Examined(checks, opened, find(checks, label_map, described_in, pair(data.crop)))


def find(
    checks: Sequence[SplitCheck],
    label_map: LabelMap | None = None,
    described_in: Path | None = None,
    crop: tuple[int, int] | None = None,
) -> list[Finding]:
    """Everything that is wrong with the splits: errors, then warnings, then notes.

    label_map     what label values mean (None: the data set has no files)
    described_in  the classes.yaml that a mapping can be written into (None: the data set's own meaning is fixed)
    crop          (height, width) of a training crop
    """
    found: list[Finding] = []
    for check in checks:
        found += _of_left_out(check)
        if check.failure is not None:
            options = f"--data.{'train' if check.training else 'val'}_split or --split"
            remedy = f"mend that; if another part of the data set is meant, name it with {options}"
            found.append(Finding("error", f"{check.split}: {check.failure}", remedy))
            continue
        found += _of_files(check)
        if check.classes.names:
            found += _of_values(check, label_map, described_in)
            if not check.unknown:
                found += _of_labels(check)
                found += _of_classes(check, label_map, described_in)
        found += _of_sizes(check, crop)
    if described_in is None:
        found += _of_near_colours(checks)
    found += _of_duplicates(checks)
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _of_left_out(check: SplitCheck) -> list[Finding]:
    """Files that make no image: a kind that a training refuses is an error."""
    found = []
    for some in check.left_out:
        if not some.files:  # it is about the data set
            found.append(Finding("error", f"{check.split}: {some.message}", some.remedy))
            continue
        text = f"{check.split}: {some.what}: {len(some.files)} of {some.total}"
        found.append(Finding("note" if some.note else "error", text, some.remedy, some.files))
    return found


def _of_files(check: SplitCheck) -> list[Finding]:
    found, total = [], len(check.images)
    if check.unreadable:
        bad = len(check.unreadable)
        found.append(
            Finding(
                "error" if bad > MOSTLY_UNREADABLE * total else "warning",
                f"{check.split}: {bad} of {total} images cannot be read",
                "save these files again, or remove them; training and evaluation skip them",
                tuple(str(image.unreadable) for image in check.unreadable),
            )
        )
    if misfits := check.misfits:
        remedy = "make these labels again, of the size of their image"
        if all(_sides_swapped(image) for image in misfits):
            remedy = "width and height are swapped: turn the labels, or the images"
            if all(image.turned for image in misfits):
                remedy = (
                    "width and height are swapped: a note in the images (EXIF) turns them, and the labels have none. "
                    "Turn the labels, or save the images without the note"
                )
        text = f"{check.split}: {len(misfits)} of {total} labels have another size than their image"
        found.append(Finding("error", text, remedy, tuple(str(image.wrong) for image in misfits)))
    if others := [image for image in check.wrong if not image.misfit]:
        text = f"{check.split}: {len(others)} of {total} labels are no label images"
        remedy = "make these labels again, as PNG with one number or colour a pixel"
        found.append(Finding("error", text, remedy, tuple(str(image.wrong) for image in others)))
    if turned := [image for image in check.images if image.turned and not image.misfit]:
        text = (
            f"{check.split}: a note (EXIF) turns or mirrors {len(turned)} of {total} images, their labels have none, "
            "and the sizes fit either way"
        )
        remedy = (
            "look at the contact sheet whether these labels fit; if not, turn them as their image, or save the images "
            "without the note"
        )
        found.append(Finding("warning", text, remedy, tuple(image.image for image in turned)))
    return found


def _sides_swapped(image: CheckedImage) -> bool:
    return image.size is not None and image.label_size == image.size[::-1] != image.size


def _of_values(check: SplitCheck, label_map: LabelMap | None, described_in: Path | None) -> list[Finding]:
    """Label values that mean nothing, or that mean the same without anybody having said so."""
    if label_map is None:
        return []
    white = _of_white(check, label_map, described_in)
    if not check.unknown:
        return white + _taken_twice(check, label_map, described_in)
    files = tuple(str(image.label) for image in check.images if image.unknown)
    total = sum(check.values.values())
    listed = ", ".join(f"{value} ({_percent(check.values[value] / total)})" for value in check.unknown[:8])
    more = f" and {len(check.unknown) - 8} more" if len(check.unknown) > 8 else ""
    coloured = check.unknown[0].startswith('"')
    what = "colours" if coloured else "label values"
    text = f"{check.split}: {what} without a class in {len(files)} of {len(check.images)} labels: {listed}{more}"
    if "16 bit" in {image.kind for image in check.images if image.unknown}:
        text += "; these files have 16 bits a pixel"
    return [*white, Finding("error", text, _mapping_remedy(check, label_map, described_in), files)]


def _of_white(check: SplitCheck, label_map: LabelMap, described_in: Path | None) -> list[Finding]:
    """255 is all that some masks hold beside 0, and nobody said that it is ignored."""
    names = check.classes.names
    if (
        described_in is None
        or label_map.strict
        or IGNORE in label_map.values
        or set(check.values) == {"0", str(IGNORE)}
    ):
        return []
    read = [image for image in check.images if image.values and image.kind != "colour"]
    found = [{int(value): count for value, count in image.values.items()} for image in read]
    alone, beside = white_alone(found)
    if alone <= beside:
        return []
    share = _percent(check.values[str(IGNORE)] / sum(check.values.values()))
    text = (
        f"{check.split}: in {alone} of {len(read)} labels {IGNORE} is all that there is beside 0: it is {share} of the "
        "pixels of the split, and is read as ignored, though nothing says so"
    )
    remedy = (
        f"say what it is in {described_in}: `mapping: {{{IGNORE}: ignore}}`, or `mapping: {{{IGNORE}: {names[-1]}}}`"
    )
    files = tuple(str(p.label) for p, values in zip(read, found, strict=True) if white_alone([values])[0])
    return [Finding("error", text, remedy, files)]


def _mapping_remedy(check: SplitCheck, label_map: LabelMap, described_in: Path | None) -> str:
    names, coloured = check.classes.names, check.unknown[0].startswith('"')
    painted = [value for value in check.values if check.values[value] >= RARE_VALUE * sum(check.values.values())]
    areas = {value for image in check.images for value in set(image.unknown) - set(image.loose)}
    loose = [value for value in check.unknown if value not in areas]
    if 2 * len(loose) > len(check.unknown):
        ignored = f"`mapping: {{{', '.join(f'{value}: ignore' for value in loose[:LONGEST_MAPPING])}}}`"
        rest = f"; or, in {described_in}, {ignored}" if described_in and len(loose) <= LONGEST_MAPPING else ""
        return f"{len(loose)} of them {LOOSE}{rest}"
    if described_in is None:
        return label_map.remedy.format(value=check.unknown[0])
    if coloured:
        pairs = ", ".join(f"{value}: NAME" for value in painted[:LONGEST_MAPPING] if value.startswith('"'))
        return (
            f"say in {described_in} what each colour means, with the name of its class, or ignore, for NAME: "
            f"`mapping: {{{pairs}}}`"
        )
    numbers = sorted(int(value) for value in check.values if not value.startswith('"'))
    return f"in {described_in}, write {_number_mapping(numbers, names)}"


def _number_mapping(values: Sequence[int], names: Sequence[str]) -> str:
    """The mapping that is most likely meant, for label values if some of them mean nothing."""
    if IGNORED_16 in values:
        return (
            f"{_mapping([IGNORED_16], [IGNORE])} if {IGNORED_16} stands for what is ignored, as {IGNORE} does in 8 bits"
        )
    plain = [value for value in values if value != IGNORE]
    count = len(names)
    if 1 <= min(plain) and max(plain) == count:
        return f"{_mapping(range(1, count + 1), range(count))}: the values run from 1, classes from 0"
    if min(plain) == 0 and max(plain) == count:
        shifted = _mapping(range(count + 1), [IGNORE, *range(count)])
        return (
            f"one more name, in front if value 0 lacks one (`names: [background, {names[0]}, ...]`); or, if {count} is "
            f"no class, {_mapping([count], [IGNORE])}; or, if 0 is none, {shifted}"
        )
    for some in (list(values), plain):
        if len(some) == count:
            return f"{_mapping(some, range(count))}, if that is the order of the names"
    lost = [value for value in plain if not 0 <= value < count]
    return f"what each value means, for example {_mapping(lost, [IGNORE] * len(lost))} to ignore them"


def _mapping(values: Sequence[int], targets: Sequence[int]) -> str:
    entries = [f"{value}: {target}" for value, target in zip(values, targets, strict=True)]
    rest = ["..."] if len(entries) > LONGEST_MAPPING else []
    return f"`mapping: {{{', '.join(entries[:LONGEST_MAPPING] + rest)}}}`"


def _taken_twice(check: SplitCheck, label_map: LabelMap, described_in: Path | None) -> list[Finding]:
    """A value that nobody mapped is its own class, and another one that was mapped is the same class."""
    if label_map.strict or described_in is None:
        return []
    found = []
    for target in range(label_map.classes):
        mapped = [value for value, to in label_map.values.items() if to == target and str(value) in check.values]
        if mapped and target not in label_map.values and str(target) in check.values:
            name = check.classes.names[target]
            found.append(
                Finding(
                    "warning",
                    f"{check.split}: the label values {target} and {mapped[0]} both mean {name}: {mapped[0]} is mapped "
                    f"to it, and {target}, which is not mapped, stands for itself",
                    f"if {target} is something else, say so in {described_in}, for example `mapping: "
                    f"{{{target}: 255, ...}}` to ignore it",
                )
            )
    return found


def _of_near_colours(checks: Sequence[SplitCheck]) -> list[Finding]:
    """Two colours that hardly differ, and no label has both of them: one class may have been painted in two ways."""
    within: dict[str, set[str]] = {}
    for image in (image for check in checks for image in check.images):
        for value, count in image.values.items():
            if value.startswith('"') and image.label and count >= RARE_VALUE * sum(image.values.values()):
                within.setdefault(value, set()).add(image.label)
    found = []
    for one, other in itertools.combinations(sorted(within), 2):
        steps = (abs(int(one[k : k + 2], 16) - int(other[k : k + 2], 16)) for k in (2, 4, 6))
        if max(steps) <= NEAR_COLOURS and not within[one] & within[other]:
            fewer = min(within[one], within[other], key=len)
            text = f"the colours {one} and {other} hardly differ, and no label has both: are they one class?"
            remedy = "if so, paint them in one colour, or map both to one class in a classes.yaml (--write_classes)"
            found.append(Finding("warning", text, remedy, tuple(sorted(fewer))))
    return found


def _of_labels(check: SplitCheck) -> list[Finding]:
    """Images that have nothing to learn from, or to score."""
    blank, counted = check.blank, check.counted
    if not counted:
        return []
    if len(blank) == len(counted):
        none = all(image.label is None for image in blank)
        why = "it has no label files" if none else f"every pixel is ignored ({IGNORE})"
        remedy = "choose a split with labels" if none else "check what the masks hold, and the mapping"
        return [Finding("error", f"{check.split}: not a single labelled pixel: {why}", remedy)]
    found = []
    if blank:
        found.append(
            Finding(
                "warning",
                f"{check.split}: {len(blank)} of {len(check.images)} images have no labelled pixel",
                "label them, or remove them: nothing is learnt from them, and they do not count in mIoU",
                tuple(image.label or image.image for image in blank),
            )
        )
    ignored = check.pixels[-1] / check.pixels.sum()
    if ignored > MOSTLY_IGNORED:
        found.append(
            Finding(
                "warning",
                f"{check.split}: {_percent(ignored)} of the pixels are ignored",
                f"is {IGNORE} (or what is mapped to it) a class, such as the background? Then name it and map it",
            )
        )
    return found


def _of_classes(check: SplitCheck, label_map: LabelMap | None, described_in: Path | None) -> list[Finding]:
    """Classes that never occur, and one that is nearly everything."""
    names, shares = check.classes.names, check.shares()
    if not shares.any():
        return []
    if len(names) == 1:
        remedy = "name the rest of the image as a class, too"
        return [Finding("error", f"{check.split}: there is one class only, {names[0]}", remedy)]
    most = int(np.argmax(shares))
    if described_in is not None and len(names) == 2 and set(check.values) == {"0", str(IGNORE)} and shares[0] == 1:
        return [
            Finding(
                "error",
                f"{check.split}: the only label values are 0 and {IGNORE}, and {IGNORE} means ignored: {names[1]} "
                f"never occurs, and a network would predict nothing but {names[0]}",
                f"in {described_in}, write `mapping: {{0: 0, {IGNORE}: 1}}`",
            )
        ]
    found = []
    if shares[most] > MOSTLY:
        only = shares[most] == 1
        what = "every labelled pixel" if only else f"{_percent(shares[most])} of the labelled pixels"
        found.append(
            Finding(
                "error" if only and check.training else "warning",
                f"{check.split}: {what} is {names[most]}; a network that predicts nothing else is right nearly always",
                "check the mapping; if the labels are right, add images with the other classes, or crop to where "
                "they are",
            )
        )
    absent = check.absent()
    if absent:
        effect = "they are not learnt: their IoU is 0" if check.training else "their IoU is nan, not part of the mean"
        hint = ""
        numbers = [int(value) for value in check.values if not value.startswith('"') and value != str(IGNORE)]
        if label_map is not None and not label_map.values and numbers and min(numbers) == 1 and names[0] in absent:
            hint = "; the lowest label value is 1: do the values run from 1, and classes from 0?"
        found.append(
            Finding(
                "warning",
                f"{check.split}: {_few(absent)} never {'occurs' if len(absent) == 1 else 'occur'}: {effect}{hint}",
                "check names and mapping; add images that show them, or divide the splits otherwise"
                if described_in is not None
                else "check that the data set is complete",
            )
        )
    if check.training:
        found += _of_rare_classes(check)
    return found


def _of_rare_classes(check: SplitCheck) -> list[Finding]:
    """Classes that occur, but have few of the pixels: a loss over all pixels hardly sees them."""
    shares = check.shares()
    rare = [k for k in np.argsort(shares, kind="stable") if 0 < shares[k] < RARE_CLASS / len(shares)]
    if not rare:
        return []
    listed = _few([f"{check.classes.names[k]} ({_percent(shares[k])})" for k in rare])
    return [
        Finding(
            "note",
            f"{check.split}: rare classes, of the labelled pixels: {listed}",
            f"if the network misses them, train with `--recipe.class_balance {BALANCE}`: their pixels count more",
        )
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more classes" if len(names) > 10 else "")


def _of_sizes(check: SplitCheck, crop: tuple[int, int] | None) -> list[Finding]:
    found = []
    tiny = tuple(image.image for image in check.images if image.size and min(image.size) < SMALLEST)
    if tiny:
        text = f"{check.split}: images with a side under {SMALLEST} pixels, which the network refuses: {len(tiny)}"
        found.append(Finding("error", text, "remove or enlarge them, with their labels", tiny))
    if crop is not None and check.training and check.smaller_than(crop) > len(check.images) / 2:
        small = check.smaller_than(crop)
        found.append(
            Finding(
                "warning",
                f"{check.split}: {small} of {len(check.images)} images are smaller than the crop of "
                f"{crop[1]}x{crop[0]} (width x height): the rest of it is padding",
                "set data.crop ([height, width]) to the size of most images or below",
            )
        )
    return found


def _of_duplicates(checks: Sequence[SplitCheck]) -> list[Finding]:
    found = []
    across: list[list] = []
    within: list[list] = []
    for group in duplicates(checks):
        (within if len({split for split, _ in group}) == 1 else across).append(group)
    for groups, text, remedy in (
        (
            across,
            "the same image, byte for byte, is in two splits",
            "remove them from one: a score on images that were trained on says nothing",
        ),
        (
            within,
            "the same image, byte for byte, is several times in a split",
            "keep one of each, unless they are meant to count more",
        ),
    ):
        if groups:
            files = tuple(" = ".join(image.image for _, image in group) for group in groups)
            found.append(Finding("warning", f"{text}: {len(groups)} times", remedy, files))
    return found


def _percent(share: float) -> str:
    if share != 1 and share > 0.9995:
        return ">99.9 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"
