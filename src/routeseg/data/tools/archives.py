"""Unpacking an archive that nobody vouches for: nothing lands outside the folder, and nothing grows without bound.

Files are written here one by one, by name and content alone. No link, device, owner or permission of the archive is
ever made, so only the members' names have to be checked.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import posixpath
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import IO, Any

COPY_BYTES = 1 << 20
MAX_READ_BYTES = 4 << 20  # tarfile reads long headers whole; one that is longer than this is an attack
MAX_MEMBERS = 1_000_000
MAX_NAME_BYTES, MAX_PATH_BYTES = 200, 1000  # of a part of a path and of all of it: what every disk takes
# What the readers of archives raise, the last ones for headers whose numbers are none; OSError without an errno, or of
# a place before the file's start, is theirs too, and not the disk's.
DAMAGED: tuple[type[Exception], ...] = (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error)
DAMAGED += (lzma.LZMAError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
DAMAGED += (struct.error,)


class BadArchive(ValueError):
    """An archive that is damaged, or that holds what no data set holds."""


@dataclass(frozen=True)
class Member:
    """What an archive says of one of its members. `link` is where a symbolic link points, from the archive's top."""

    name: str
    size: int
    is_file: bool
    is_folder: bool
    is_sparse: bool
    link: str | None
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path, folder: Path, inside: str, limit_bytes: int, on_bytes: Callable[[int], Any] | None = None
) -> int:
    """Writes the files below `inside` of a .zip, .tar or .tgz into a new folder. Returns how many.

    limit_bytes   what all members together may be when unpacked
    on_bytes      is given how many bytes were written in all

    Links that stay inside the archive are left out. Raises BadArchive, naming the member, for a path or a link that
    leaves the folder, for a device, for a name that comes twice, for more bytes than the limit, and for an archive
    that is damaged; OSError if the disk is full. The folder then holds what was written until then.
    """
    declared = written = files = 0
    folder.mkdir(parents=True)
    try:
        with _members(archive) as members:
            for count, member in enumerate(members, 1):
                _refuse_hostile(member, archive)
                declared += member.size
                if declared > limit_bytes or count > MAX_MEMBERS:
                    raise BadArchive(
                        f"{archive} unpacks to more than {limit_bytes / 1e9:.1f} GB or {MAX_MEMBERS} files, far more "
                        "than this data set has: it is not unpacked"
                    )
                name = posixpath.normpath(member.name)
                if not member.is_file or not name.startswith(f"{inside}/"):
                    continue
                _write(member, folder / name.removeprefix(f"{inside}/"), archive)
                files, written = files + 1, written + member.size
                if on_bytes is not None:
                    on_bytes(written)
    except DAMAGED as error:
        if isinstance(error, BadArchive) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise
        raise BadArchive(f"{archive} is damaged: {error}. Remove it, and download it again") from error
    if not files:
        raise BadArchive(f"{archive} holds no files below {inside}/: this is another archive")
    return files


def _refuse_hostile(member: Member, archive: Path) -> None:
    what, name = None, member.name.encode("utf-8", "surrogateescape")
    if len(name) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in name.split(b"/")):
        what = "a name that is too long"
    elif member.size < 0:
        what = "a file of less than nothing"
    elif member.is_sparse:
        what = "a sparse file"
    elif _leaves(member.name):
        what = "a path that leaves the folder"
    elif member.link is not None and _leaves(member.link):
        what = f"a link to {member.link[:MAX_NAME_BYTES]!r}, out of the folder"
    elif not (member.is_file or member.is_folder or member.link is not None):
        what = "a device or another special file"
    if what:
        raise BadArchive(f"{archive} holds {member.name[:MAX_NAME_BYTES]!r}, {what}: it is not unpacked")


def _leaves(name: str) -> bool:
    """Whether a path is absolute, climbs out, or means another thing on another system."""
    path = posixpath.normpath(name)
    elsewhere = bool(PureWindowsPath(name).drive) or "\\" in name or "\0" in name
    return elsewhere or path == ".." or path.startswith(("/", "../"))


def _write(member: Member, target: Path, archive: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise BadArchive(f"{archive} holds {member.name!r} twice: it is not unpacked") from error
    source = member.open()
    assert source is not None, "a regular file"
    with file, source:
        shutil.copyfileobj(source, file, COPY_BYTES)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """The members of an archive, in the order in which they lie in it."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            yield (_zip_member(opened, info) for info in opened.infolist())
    else:
        compressed = archive.suffix in (".tgz", ".gz")
        with gzip.open(archive) if compressed else archive.open("rb") as file:
            with tarfile.open(fileobj=_ShortReads(file), mode="r:") as tar:  # type: ignore[call-overload]
                yield (_tar_member(tar, info) for info in tar)


def _zip_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    if info.flag_bits & 1:
        raise zipfile.BadZipFile(f"{info.filename} is encrypted")
    kind = stat.S_IFMT(info.external_attr >> 16)
    link = None
    if kind == stat.S_IFLNK:
        with opened.open(info) as file:
            link = posixpath.join(posixpath.dirname(info.filename), file.read(MAX_READ_BYTES).decode(errors="replace"))
    regular = kind in (0, stat.S_IFREG) and not info.is_dir()
    return Member(info.filename, info.file_size, regular, info.is_dir(), False, link, lambda: opened.open(info))


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    link = None
    if info.issym():
        link = posixpath.join(posixpath.dirname(info.name), info.linkname)
    elif info.islnk():
        link = info.linkname
    return Member(
        info.name, info.size, info.isreg(), info.isdir(), info.issparse(), link, lambda: tar.extractfile(info)
    )


class _ShortReads:
    """A file as tarfile needs it, which does not give very much at once: no header fills the memory."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)
