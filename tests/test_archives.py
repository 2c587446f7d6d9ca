"""Unpacking archives that mean harm: nothing leaves the folder, fills the disk or the memory, or stays half done."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from downloads import ARCHIVE, INSIDE, LIMIT, PICTURES, Serving, everything, fetch, source_of, tar_of, zip_of
from routeseg.data.tools import archives
from routeseg.data.tools.archives import BadArchive, unpack


def device(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.CHRTYPE
    return info


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sparse(name: str, **headers: str) -> bytes:
    """A tar of one sparse file of GNU tar, in the form of pax headers."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = 4, headers
        tar.addfile(info, io.BytesIO(b"good"))
    return file.getvalue()


def with_size(data: bytes, size: int) -> bytes:
    """An uncompressed tar whose first header says another size, in base 256."""
    info = tarfile.TarInfo.frombuf(data[:512], "utf-8", "surrogateescape")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def old_sparse(map_of_it: bytes) -> bytes:
    """A tar of one sparse file in GNU tar's old form, with this map of where its data lie."""
    info = tarfile.TarInfo(f"{INSIDE}/a")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 4
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386 : 386 + len(map_of_it)] = map_of_it
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"good" + bytes(1532)


def zip_link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


GOOD = (f"{INSIDE}/img/a.bin", b"good")
HOSTILE = {
    "a path up": (tar_of(GOOD, ("../evil", b"x")), "'../evil', a path that leaves"),
    "a path up, late": (tar_of(GOOD, (f"{INSIDE}/x/../../../../evil", b"x")), "a path that leaves"),
    "an absolute path": (tar_of(GOOD, ("/tmp/evil", b"x")), "'/tmp/evil', a path that leaves"),
    "a drive": (tar_of(GOOD, (r"C:\evil", b"x")), "a path that leaves"),
    "a link out": (tar_of(GOOD, link(f"{INSIDE}/img/l", "../../../../etc/passwd")), "a link to .*out of the folder"),
    "a link to the root": (tar_of(GOOD, link("top/l", "/etc")), "a link to '/etc'"),
    "a hard link out": (tar_of(GOOD, link("top/l", "../../etc/passwd", tarfile.LNKTYPE)), "a link to"),
    "a device": (tar_of(GOOD, device(f"{INSIDE}/img/d")), "a device"),
    "a name twice": (tar_of(GOOD, GOOD), "twice"),
    "a file as folder": (tar_of(GOOD, (f"{INSIDE}/img/a.bin/b", b"x")), "twice"),
    "a bomb": (tar_of(GOOD, (f"{INSIDE}/img/big", bytes(LIMIT + 1))), "unpacks to more than 0.0 GB"),
    "a bomb elsewhere": (tar_of(("else/big", bytes(LIMIT + 1)), GOOD), "unpacks to more than"),
    "a long name": (tar_of(GOOD, (f"{INSIDE}/{'a' * 300}", b"x")), "a name that is too long"),
    "a long path": (tar_of(GOOD, (f"{INSIDE}/{'a/' * 3000}b", b"x")), "a name that is too long"),
    "a long name elsewhere": (tar_of(("é" * 150, b"x"), GOOD), "a name that is too long"),
    "less than nothing": (gzip.compress(with_size(tar_of(GOOD, mode="w"), -(1 << 40))), "is damaged|less than nothing"),
    "a sparse file": (gzip.compress(sparse(f"{INSIDE}/a", **{"GNU.sparse.map": "0,4"})), "a sparse file"),
    "a sparse map of words": (gzip.compress(sparse(f"{INSIDE}/a", **{"GNU.sparse.map": "x,y"})), "is damaged"),
    "a sparse map of one": (gzip.compress(sparse(f"{INSIDE}/a", **{"GNU.sparse.map": "1"})), "sparse|damaged"),
    "a sparse size of words": (
        gzip.compress(sparse(f"{INSIDE}/a", **{"GNU.sparse.map": "0,4", "GNU.sparse.size": "x"})),
        "is damaged",
    ),
    "a sparse map in the data": (
        gzip.compress(sparse(f"{INSIDE}/a", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})),
        "is damaged",
    ),
    "an old sparse file": (gzip.compress(old_sparse(b"00000000000\x0000000000004\0")), "a sparse file"),
    "an old sparse map of words": (gzip.compress(old_sparse(b"x" * 24)), "is damaged|sparse"),
    "no gzip": (b"<html>404, but politely</html>", "is damaged"),
    "cut off": (ARCHIVE[:100_000], "is damaged"),
    "other contents": (tar_of(("top/other/a", b"x")), "holds no files below top/data/"),
}
HOSTILE_ZIPS = {
    "a path up": (zip_of(GOOD, ("../evil", b"x")), "'../evil', a path that leaves"),
    "an absolute path": (zip_of(GOOD, ("/tmp/evil", b"x")), "a path that leaves"),
    "backslashes": (zip_of(GOOD, (r"..\evil", b"x")), "a path that leaves"),
    "a link out": (zip_of(GOOD, zip_link("top/l", "../../etc")), "a link to"),
    "a bomb": (zip_of(GOOD, (f"{INSIDE}/big", bytes(LIMIT + 1))), "unpacks to more than"),
    "a long name": (zip_of(GOOD, (f"{INSIDE}/{'a' * 300}", b"x")), "a name that is too long"),
    "a name in no code": (
        zip_of(GOOD, (f"{INSIDE}/é", b"x")).replace("é".encode(), b"\xff\xff"),
        "is damaged",
    ),
    "a place before the start": (
        (end := zip_of(GOOD))[:-6] + (len(end) * 9).to_bytes(4, "little") + end[-2:],
        "is damaged",
    ),
    "no zip": (b"nothing", "is damaged"),
    "cut off": (zip_of(GOOD, (f"{INSIDE}/b", bytes(100)))[:-30], "is damaged"),
}


class TestHostileArchives:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_tar(self, server, tmp_path, name):
        content, words = HOSTILE[name]
        self.check(server, tmp_path, content, words, "archive.tgz")

    @pytest.mark.parametrize("name", HOSTILE_ZIPS)
    def test_a_zip(self, server, tmp_path, name):
        content, words = HOSTILE_ZIPS[name]
        self.check(server, tmp_path, content, words, "archive.zip")

    def check(self, server: Serving, tmp_path: Path, content: bytes, words: str, archive: str) -> None:
        root = tmp_path / "deep" / "down" / "root"
        source = source_of(server, content, checksum=None, archive=archive, files={"img/a.bin": 1})
        with pytest.raises(BadArchive, match=words) as error:
            fetch(source, root)
        assert str(root / archive) in str(error.value) and "\n" not in str(error.value)
        assert everything(tmp_path) == set() and list(root.iterdir()) == [], "nothing in it, nothing outside"

    def test_a_header_that_fills_the_memory(self, tmp_path):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, archives.MAX_READ_BYTES * 4
        buffer = io.BytesIO()
        buffer.write(info.tobuf() + b"a" * info.size)
        path = tmp_path / "a.tar"
        path.write_bytes(buffer.getvalue())
        with pytest.raises(BadArchive, match="is damaged"):
            unpack(path, tmp_path / "out", INSIDE, LIMIT)

    @pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_flipped_bits_in_a_zip(self, tmp_path, method):
        data = bytearray(zip_of((f"{INSIDE}/a", bytes(20_000) + PICTURES["a.bin"]), method=method))
        start = 30 + len(f"{INSIDE}/a")  # behind the header of the file
        data[start : start + 40] = (byte ^ 0xFF for byte in data[start : start + 40])
        path = tmp_path / "a.zip"
        path.write_bytes(bytes(data))
        with pytest.raises(BadArchive, match="is damaged"):
            unpack(path, tmp_path / "out", INSIDE, LIMIT)

    def test_a_link_within_is_left_out(self, tmp_path):
        path = tmp_path / "a.tgz"
        path.write_bytes(tar_of(GOOD, link(f"{INSIDE}/img/l", "a.bin")))
        assert unpack(path, tmp_path / "out", INSIDE, LIMIT) == 1
        assert everything(tmp_path / "out") == {"img/a.bin"}

    def test_names_with_a_dot_in_front(self, tmp_path):
        path = tmp_path / "a.tar"
        path.write_bytes(tar_of((f"./{INSIDE}/img/a", b"x"), mode="w"))
        assert unpack(path, tmp_path / "out", INSIDE, LIMIT) == 1
        assert everything(tmp_path / "out") == {"img/a"}

    def test_a_verified_archive_with_a_surprise_is_kept(self, server, tmp_path):
        with pytest.raises(BadArchive):
            fetch(source_of(server, HOSTILE["a path up"][0]), tmp_path)
        assert everything(tmp_path) == {"archive.tgz"}, "so that nobody has to download it again to look at it"
