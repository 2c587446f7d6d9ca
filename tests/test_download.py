"""Downloading data sets from a server that breaks, lies or is not there, and unpacking archives that mean harm."""

from __future__ import annotations

import errno
import hashlib
import io
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run
from routeseg.data.sets.camvid import open_camvid
from routeseg.data.tools import archives
from routeseg.data.tools.archives import BadArchive, unpack
from routeseg.data.tools.download import SOURCES, TRIES, DownloadError, Source, check_camvid, download, parse_checksum

INSIDE, LIMIT = "top/data", 10_000_000


@dataclass
class Serving:
    """What the server does, and what it was asked for."""

    content: bytes = b""
    breaks: list[int] = field(default_factory=list)  # bytes to send of each of the first answers before hanging up
    ranges: bool = True
    status: int | None = None
    length: bool = True
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request
    sent: int = 0
    address: str = ""


@pytest.fixture
def server():
    """A server on this machine, for one file."""
    serving = Serving()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            serving.asked.append(wanted)
            if serving.status:
                return self.send_error(serving.status)
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and serving.ranges else 0
            if start >= len(serving.content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(serving.content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            body = serving.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(serving.content) - 1}/{len(serving.content)}")
            if serving.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if serving.breaks:
                body = body[: serving.breaks.pop(0)]
            self.wfile.write(body)
            serving.sent += len(body)

        def log_message(self, *words):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    serving.address = f"http://127.0.0.1:{http.server_address[1]}/archive.tgz"
    yield serving
    http.shutdown()
    http.server_close()
    thread.join()


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return buffer.getvalue()


PICTURES = {f"{name}.bin": np.random.default_rng(index).bytes(60_000) for index, name in enumerate("abcd")}
ARCHIVE = tar_of(
    ("top/other/readme", b"not wanted"), *((f"{INSIDE}/img/{name}", data) for name, data in PICTURES.items())
)


def source_of(server: Serving, content: bytes = ARCHIVE, **changes) -> Source:
    """A data set of four files, which the server has."""
    server.content = content
    options = {
        "url": server.address,
        "checksum": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "archive": "archive.tgz",
        "archive_bytes": None,
        "inside": INSIDE,
        "folder": "sets/mine",
        "limit_bytes": LIMIT,
        "files": {"img/*.bin": 4},
        "check": None,
        "train_with": "--data.root {root}",
    }
    return Source(**(options | changes))


def fetch(source: Source, root: Path, **options) -> list[str]:
    """What the download says."""
    said: list[str] = []
    download(source, root, say=said.append, wait_s=0.0, **options)
    return said


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


WHOLE = {f"sets/mine/img/{name}" for name in PICTURES}


class TestDownload:
    def test_a_data_set_is_there_and_nothing_else(self, server, tmp_path):
        steps, unpacked = [], []
        fetch(source_of(server), tmp_path, on_bytes=lambda *step: steps.append(step), on_unpacked=unpacked.append)
        assert everything(tmp_path) == WHOLE
        for name, data in PICTURES.items():
            assert (tmp_path / "sets/mine/img" / name).read_bytes() == data
        assert steps[-1] == (len(ARCHIVE), len(ARCHIVE)) and [s[0] for s in steps] == sorted(s[0] for s in steps)
        assert unpacked[-1] == sum(map(len, PICTURES.values()))

    def test_once_there_nothing_is_done(self, server, tmp_path):
        source = source_of(server)
        fetch(source, tmp_path)
        said = fetch(source, tmp_path)
        assert len(server.asked) == 1 and len(said) == 1 and "nothing to do" in said[0]

    def test_a_data_set_with_a_hole_is_left_alone(self, server, tmp_path):
        source = source_of(server)
        fetch(source, tmp_path)
        (tmp_path / "sets/mine/img/b.bin").unlink()
        with pytest.raises(DownloadError, match=r"sets/mine is there already, but has 3 files img/\*.bin instead of 4"):
            fetch(source, tmp_path)
        assert len(server.asked) == 1 and len(everything(tmp_path)) == 3

    def test_the_archive_can_be_kept(self, server, tmp_path):
        fetch(source_of(server), tmp_path, keep_archive=True)
        assert everything(tmp_path) == WHOLE | {"archive.tgz"}

    def test_an_archive_that_lies_there_is_used_and_stays(self, server, tmp_path):
        source = source_of(server)
        (tmp_path / "archive.tgz").write_bytes(ARCHIVE)
        fetch(source, tmp_path)
        assert server.asked == [] and everything(tmp_path) == WHOLE | {"archive.tgz"}

    def test_a_wrong_archive_that_lies_there_is_named_and_not_removed(self, server, tmp_path):
        source = source_of(server)
        (tmp_path / "archive.tgz").write_bytes(b"something else")
        with pytest.raises(DownloadError, match="archive.tgz has the sha256 sum .* instead of .*: remove it"):
            fetch(source, tmp_path)
        assert server.asked == [] and everything(tmp_path) == {"archive.tgz"}

    def test_no_length_from_the_server(self, server, tmp_path):
        server.length = False
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE


class TestBrokenConnection:
    def test_a_broken_download_is_tried_again_and_goes_on(self, server, tmp_path):
        server.breaks = [50_000, 70_000]
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE
        assert server.asked == [None, "bytes=50000-", "bytes=120000-"]
        assert server.sent == len(ARCHIVE), "no byte came twice"

    def test_a_second_run_goes_on_where_the_first_ended(self, server, tmp_path):
        server.breaks = [20_000] * TRIES
        source = source_of(server)
        with pytest.raises(DownloadError, match=rf"broke {TRIES} times.*0.1 MB are kept.*Run this again"):
            fetch(source, tmp_path)
        assert len(server.asked) == TRIES and everything(tmp_path) == {"archive.tgz.part"}
        said = fetch(source, tmp_path)
        assert server.asked[TRIES:] == [f"bytes={20_000 * TRIES}-"] and server.sent == len(ARCHIVE)
        assert "going on after 0.1 MB" in said[0] and everything(tmp_path) == WHOLE

    def test_a_server_that_cannot_go_on_starts_again(self, server, tmp_path):
        server.ranges, server.breaks = False, [50_000]
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE and server.sent == len(ARCHIVE) + 50_000

    def test_all_had_arrived_before(self, server, tmp_path):
        (tmp_path / "archive.tgz.part").write_bytes(ARCHIVE)
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE and server.sent == 0
        shutil.rmtree(tmp_path / "sets")
        (tmp_path / "archive.tgz.part").write_bytes(ARCHIVE)
        fetch(source_of(server, archive_bytes=len(ARCHIVE)), tmp_path)
        assert everything(tmp_path) == WHOLE and len(server.asked) == 1, "of a known size, nobody is asked"

    def test_more_had_arrived_than_there_is(self, server, tmp_path):
        (tmp_path / "archive.tgz.part").write_bytes(ARCHIVE + b"of another file")
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE

    def test_the_part_of_another_file_is_found_out(self, server, tmp_path):
        (tmp_path / "archive.tgz.part").write_bytes(bytes(1000))
        with pytest.raises(DownloadError, match="does not match"):
            fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == set()

    @pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (403, "403 Forbidden"), (503, "503")])
    def test_a_server_that_refuses(self, server, tmp_path, status, words):
        server.status = status
        with pytest.raises(DownloadError, match=rf"{words}.*--url"):
            fetch(source_of(server), tmp_path)
        assert len(server.asked) == 1 and everything(tmp_path) == set()

    def test_no_connection(self, server, tmp_path):
        source = source_of(server, url="http://127.0.0.1:1/archive.tgz")
        start = time.monotonic()
        with pytest.raises(DownloadError, match="no connection to http://127.0.0.1:1/archive.tgz"):
            download(source, tmp_path)
        assert time.monotonic() - start < 5, "it is not tried again and again"

    def test_an_address_that_is_none(self, server, tmp_path):
        with pytest.raises(DownloadError, match="file:///etc/passwd is no http address.*can lie in the folder"):
            fetch(source_of(server, url="file:///etc/passwd"), tmp_path)


class TestChecksum:
    def test_a_wrong_one_names_both_and_removes_the_file(self, server, tmp_path):
        wrong = "ab" * 32
        right = hashlib.sha256(ARCHIVE).hexdigest()
        with pytest.raises(DownloadError, match=rf"expected sha256:{wrong} but got {right}") as error:
            fetch(source_of(server, checksum=f"sha256:{wrong}"), tmp_path)
        assert everything(tmp_path) == set() and "--url" in str(error.value)

    def test_a_mirror_is_checked_too(self, server, tmp_path):
        source = replace(source_of(server), url=server.address)
        server.content = ARCHIVE[:-1] + b"x"
        with pytest.raises(DownloadError, match="does not match"):
            fetch(source, tmp_path)

    def test_without_one_the_contents_decide(self, server, tmp_path):
        fetch(source_of(server, checksum=None), tmp_path / "right")
        assert everything(tmp_path / "right") == WHOLE
        less = tar_of((f"{INSIDE}/img/a.bin", b"1"))
        with pytest.raises(BadArchive, match=r"it has 1 files img/\*.bin instead of 4"):
            fetch(source_of(server, less, checksum=None), tmp_path / "less")
        assert everything(tmp_path / "less") == set()

    @pytest.mark.parametrize("text", ["", "abc", "md5:123", "crc32:" + "0" * 8, "sha256:" + "g" * 64])
    def test_what_is_no_checksum(self, text):
        with pytest.raises(ValueError, match="write ALGORITHM:HEX"):
            parse_checksum(text)

    def test_what_is_one(self):
        assert parse_checksum("MD5:" + "AB" * 16) == "md5:" + "ab" * 16 and parse_checksum("none") is None

    def test_those_of_the_data_sets(self):
        for source in SOURCES.values():
            assert source.checksum is not None and parse_checksum(source.checksum) == source.checksum


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


class TestDisk:
    @pytest.fixture
    def small_files(self):
        """A file cannot grow beyond 100,000 bytes, as on a full disk."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    def test_full_while_downloading(self, server, tmp_path, small_files):
        with pytest.raises(DownloadError, match=r"the disk is full.*archive.tgz.part is kept: make room, and run this"):
            fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == {"archive.tgz.part"}
        assert (tmp_path / "archive.tgz.part").read_bytes() == ARCHIVE[:100_000]

    def test_and_then_there_is_room(self, server, tmp_path):
        (tmp_path / "archive.tgz.part").write_bytes(ARCHIVE[:100_000])
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE and server.asked == ["bytes=100000-"]

    def test_full_while_unpacking(self, server, tmp_path, small_files):
        content = tar_of((f"{INSIDE}/img/a.bin", bytes(200_000)))
        with pytest.raises(DownloadError, match=r"the disk is full.*archive.tgz is kept"):
            fetch(source_of(server, content), tmp_path)
        assert everything(tmp_path) == {"archive.tgz"}, "no download is lost, and nothing is half unpacked"

    def test_too_small_is_said_beforehand(self, server, tmp_path):
        with pytest.raises(DownloadError, match=r"GB free, 2000000.1 GB are needed"):
            fetch(source_of(server, archive_bytes=10**15), tmp_path)
        assert server.asked == [] and everything(tmp_path) == set()

    def test_a_file_in_place_of_the_folder(self, server, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="cannot write into .*file"):
            fetch(source_of(server), tmp_path / "file")
        assert server.asked == []

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write into")
    def test_a_folder_that_cannot_be_written(self, server):
        with pytest.raises(ValueError, match="cannot write into /proc/routeseg: .* Choose another folder"):
            fetch(source_of(server), Path("/proc/routeseg"))
        assert server.asked == []

    def test_a_place_that_is_taken(self, server, tmp_path):
        (tmp_path / "sets").touch()
        with pytest.raises(DownloadError, match="cannot write"):
            fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == {"sets", "archive.tgz"}


SLOW_UNPACKING = """
import signal, time
from pathlib import Path
from routeseg.data.tools.download import Source, download
def stop(written):
    print("unpacked", flush=True)
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
source = Source({url!r}, {checksum!r}, "archive.tgz", None, {inside!r}, "sets/mine", {limit}, {{}}, None, "")
download(source, Path({root!r}), say=lambda text: None, on_unpacked=stop)
"""


class TestInterrupted:
    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
    def test_while_unpacking(self, server, tmp_path, how):
        source = source_of(server)
        code = SLOW_UNPACKING.format(
            url=source.url, checksum=source.checksum, inside=INSIDE, limit=LIMIT, root=str(tmp_path)
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout.readline() == "unpacked\n"
        with pytest.raises(DownloadError, match="another download of archive.tgz"):
            fetch(source, tmp_path)
        process.send_signal(how)
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "sets").exists()
        if how == signal.SIGINT:
            assert everything(tmp_path) == {"archive.tgz"}
        fetch(source, tmp_path)
        assert len(server.asked) == 1, "it is not downloaded again"
        assert everything(tmp_path) - {".archive.tgz.lock"} == WHOLE | {"archive.tgz"}


def camvid_zip(count: dict[str, int], top: str, worst_label: int = 11) -> bytes:
    """SegNet's CamVid in small."""
    rng = np.random.default_rng(0)
    members = [(f"{Path(top).parent}/README.md", b"SegNet")]
    for split, pictures in count.items():
        for index in range(pictures):
            labels = rng.integers(0, worst_label + 1, (12, 16)).astype(np.uint8)
            labels[0, 0] = worst_label
            for part, pixels in (("", rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)), ("annot", labels)):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                members.append((f"{top}/{split}{part}/{index:04d}.png", file.getvalue()))
    return zip_of(*members)


class TestCamvid:
    COUNT = {"train": 3, "val": 2, "test": 2}

    def source(self, server: Serving, content: bytes) -> Source:
        server.content = content
        files = {f"{split}{part}/*.png": n for split, n in self.COUNT.items() for part in ("", "annot")}
        return replace(SOURCES["camvid"], url=server.address, checksum=None, files=files)

    def test_what_is_unpacked_can_be_trained_on(self, server, tmp_path):
        fetch(self.source(server, camvid_zip(self.COUNT, SOURCES["camvid"].inside)), tmp_path)
        assert [len(open_camvid(tmp_path / "CamVid", split)) for split in self.COUNT] == [3, 2, 2]
        assert not (tmp_path / "CamVid/README.md").exists()

    def test_other_labels_are_found_out(self, server, tmp_path):
        content = camvid_zip(self.COUNT, SOURCES["camvid"].inside, worst_label=31)
        with pytest.raises(BadArchive, match="not the data set that it should be.*label value"):
            fetch(self.source(server, content), tmp_path)
        assert everything(tmp_path) == set()

    def test_the_real_labels_pass(self, camvid_root, tmp_path):
        for part in ("train", "val", "test"):
            for ending in ("", "annot"):
                real = camvid_root / f"{part.replace('test', 'val')}{ending}"
                (tmp_path / f"{part}{ending}").mkdir()
                for path in sorted(real.iterdir())[:5]:
                    (tmp_path / f"{part}{ending}" / path.name).symlink_to(path)
        check_camvid(tmp_path)


class TestCommand:
    def words(self, server: Serving, monkeypatch, content: bytes = ARCHIVE) -> list[str]:
        source = source_of(server, content)
        monkeypatch.setitem(SOURCES, "sbd", replace(source, url="http://127.0.0.1:1/"))
        return ["download", "sbd"]

    def test_from_a_mirror(self, server, tmp_path, monkeypatch, capsys):
        words = [*self.words(server, monkeypatch), tmp_path, "--url", server.address]
        code, out, _ = run(words, capsys)
        assert code == 0 and f"train on it with --data.root {tmp_path}" in out
        assert everything(tmp_path) == WHOLE
        code, out, _ = run(words, capsys)
        assert code == 0 and "nothing to do" in out

    def test_another_checksum(self, server, tmp_path, monkeypatch, capsys):
        words = [*self.words(server, monkeypatch), tmp_path, "--url", server.address]
        code, _, err = run([*words, "--checksum", "md5:" + "0" * 32], capsys)
        assert code == 2 and hashlib.md5(ARCHIVE).hexdigest() in err and everything(tmp_path) == set()
        code, out, _ = run([*words, "--checksum", "none", "--keep_archive", "true"], capsys)
        assert code == 0 and everything(tmp_path) == WHOLE | {"archive.tgz"}

    def test_the_home_that_cannot_be_reached(self, server, tmp_path, monkeypatch, capsys):
        code, _, err = run([*self.words(server, monkeypatch), tmp_path], capsys)
        assert code == 2 and err.startswith("routeseg: error: no connection to http://127.0.0.1:1/")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("cityscapes", ["leftImg8bit_trainvaltest.zip", "gtFine/{train,val,test}/CITY", "--data.name cityscapes"]),
            ("ade20k", ["ADEChallengeData2016.zip", "annotations/{training,validation}", "--data.name ade20k"]),
            ("imagenet", ["ILSVRC2012_img_train.tar", "ROOT/train/n01440764/NAME.JPEG"]),
        ],
    )
    def test_what_is_done_by_hand(self, tmp_path, capsys, name, words):
        code, out, err = run(["download", name, tmp_path / "new"], capsys)
        assert code == 2 and all(word in out for word in words) and err == ""
        assert not (tmp_path / "new").exists()

    def test_a_data_set_that_is_not_known(self, tmp_path, capsys):
        code, _, err = run(["download", "voc", tmp_path], capsys)
        assert code == 2 and "no data set 'voc'" in err and "voc2012" in err

    def test_a_full_disk_is_one_line(self, server, tmp_path, monkeypatch, capsys):
        def full(*words):
            raise OSError(errno.ENOSPC, "No space left on device", "archive")

        words = [*self.words(server, monkeypatch), tmp_path, "--url", server.address]
        monkeypatch.setattr("routeseg.data.tools.download.unpack", full)
        code, _, err = run(words, capsys)
        assert code == 2 and "the disk is full" in err and err.count("\n") == 1
