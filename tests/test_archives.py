"""Unpacking archives that mean harm: nothing leaves the folder, fills the disk or the memory, or stays half done."""

from __future__ import annotations

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
