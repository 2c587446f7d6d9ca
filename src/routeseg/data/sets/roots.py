"""Finding the parts of a data set: its folders, the lists that name its images, and label files of class numbers.

What is missing is named, together with the tree that was expected.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from routeseg.data.decoding import IMAGE_SUFFIXES
from routeseg.data.label_files import read_label_file
from routeseg.data.pairs import LeftOut, Pair, leave_out, one_form
from routeseg.errors import CONTROL

FILE = "classes.yaml"  # what describes a folder of your own images


def need_folders(root: Path, folders: Iterable[str], data_set: str, tree: str) -> None:
    """Raises ValueError, naming the first of the sub-folders that is missing, and showing the expected tree."""
    if not root.is_dir():
        raise ValueError(f"no folder {root}: give the folder of {data_set} with --data.root; {expected(tree)}")
    for folder in folders:
        if not (root / folder).is_dir():
            raise ValueError(f"{root} has no folder {folder}/; {expected(tree)}")


def expected(tree: str) -> str:
    """The tree for a message, indented below a line of its own."""
    return "the expected tree is\n" + "\n".join(f"  {line}" for line in tree.strip("\n").splitlines())


def no_split(data_set: str, split: str, splits: Iterable[str], hint: str = "") -> ValueError:
    """The error for a split that the data set has not."""
    return ValueError(f"{data_set} has no split {split!r}: choose one of {', '.join(splits)}{hint}")


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, as Windows writes it. Bytes that are not UTF-8 are kept, as
    Python keeps them in paths. Raises ValueError if it is no text."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding, errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: save it as such") from error


def in_windows_encoding(text: str) -> str:
    """A text whose bytes are not UTF-8 as Windows reads it; any other as it is."""
    odd = any("\udc80" <= char <= "\udcff" for char in text)
    return text.encode(errors="surrogateescape").decode("cp1252", errors="replace") if odd else text


def read_lines(path: Path) -> list[str]:
    """The lines of `read_text` that are not empty, without the space around them.

    Raises ValueError if one has control characters.
    """
    lines = re.split("\r\n|\r|\n", read_text(path))
    for number, line in enumerate(lines, 1):
        if CONTROL.search(line):
            raise ValueError(
                f"{path}, line {number}, has control characters, {ascii(line[:40])}: save it as plain text in UTF-8"
            )
    return [line.strip() for line in lines if line.strip()]


def read_names(path: Path, known: Iterable[str] = ()) -> list[str]:
    """The names in a list of images, one a line, in order; see `read_lines` and `match_names`, which `known` is for.

    Raises ValueError if the list is missing or empty, or has a name twice.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: it lists the images of a split, one name a line")
    names = match_names(read_lines(path), known)
    if not names:
        raise ValueError(f"{path} is empty: it lists the images of a split, one name a line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names {twice[0]} more than once ({len(twice)} names are so): keep one line of each")
    return names


def match_names(lines: Iterable[str], known: Iterable[str]) -> list[str]:
    """Which of the names that are known each line calls: itself, or as other systems and tools write it, with
    backslashes, another form of Unicode, an encoding of Windows, the suffix of the file, the folders above it, quotes,
    or the file of the mask behind it. A line that calls none of them stays as it is."""
    names = {one_form(name): name for name in known}
    return [next((names[text] for text in _spellings(line) if text in names), line) for line in lines]


def _spellings(line: str) -> Iterator[str]:
    """What a line may call, the likeliest first."""
    yield line
    for text in dict.fromkeys((line, in_windows_encoding(line))):
        for column in (text, re.split(r"[\t,;]|(?<=\.\w{3})\s|(?<=\.\w{4})\s", text)[0]):
            path = one_form(column.strip(" \"'")).replace("\\", "/").removeprefix("./")
            parts = path.split("/")
            for start in range(len(parts)):
                tail = "/".join(parts[start:])
                yield tail
                if Path(tail).suffix.lower() in IMAGE_SUFFIXES:
                    yield tail[: -len(Path(tail).suffix)]


def files_of(folder: Path, suffix: str) -> dict[str, Path]:
    """Name without `suffix` -> file, sorted, for the files of a folder that end so; none if it is missing. Names are in
    one form of Unicode.

    Hidden files, such as the ._* that macOS leaves behind, do not count.
    """
    if not folder.is_dir():
        return {}
    names = sorted(path.name for path in folder.iterdir())
    return {one_form(n.removesuffix(suffix)): folder / n for n in names if n.endswith(suffix) and not n.startswith(".")}


def look_up(
    names: Sequence[str],
    files: dict[str, Path],
    listed_in: Path | str,
    folder: Path,
    suffix: str,
    left_out: list[LeftOut] | None = None,
) -> dict[str, Path]:
    """Name -> file, of those that are there. Without `left_out`, which takes the others, an absent one is a ValueError
    that names the first and how many there are."""
    absent = [name for name in names if name not in files]
    if absent:
        remedy = "unpack the data set again, or take the names out of the list"
        first = folder / (absent[0] + suffix)
        text = f"{first} is not there, though {listed_in} lists it ({len(absent)} of {len(names)} are absent): {remedy}"
        lost = tuple(str(folder / (name + suffix)) for name in absent)
        leave_out(
            LeftOut(f"files of {folder.name} that are listed and absent", lost, len(names), text, remedy), left_out
        )
    return {name: files[name] for name in names if name in files}


def check_names(pairs: Sequence[Pair], what: str) -> list[Pair]:
    """The pairs. Raises ValueError if there are none, or two have one name: their results would be mixed up."""
    if not pairs:
        raise ValueError(f"{what} holds no images")
    first: dict[str, Pair] = {}
    for pair in pairs:
        if pair.name in first:
            raise ValueError(
                f"{first[pair.name].image} and {pair.image} have the same name in {what}: keep one of them"
            )
        first[pair.name] = pair
    return list(pairs)


def read_class_numbers(path: Path, remedy: str) -> np.ndarray:
    """A label file that must hold one byte a pixel, [H,W].

    Raises UnreadableImage as `read_label_file` does, and ValueError, with the remedy, for colours and for 16 bits.
    """
    values = read_label_file(path)
    if values.ndim == 3:
        raise ValueError(f"{path} is coloured (RGB), its pixels must be class numbers: {remedy}")
    if values.dtype in (np.uint16, np.int32):
        raise ValueError(f"{path} has 16 or more bits a pixel, labels have 8: {remedy}")
    return values
