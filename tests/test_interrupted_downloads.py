"""Downloads onto disks that are full, into folders that cannot be written, and downloads that are killed."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from downloads import ARCHIVE, INSIDE, LIMIT, WHOLE, everything, fetch, source_of, tar_of
from routeseg.data.tools.download import DownloadError


@contextmanager
def small_files() -> Iterator[None]:
    """A file cannot grow beyond 100,000 bytes, as on a full disk; not around a whole test, whose report may be one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class TestDisk:
    def test_full_while_downloading(self, server, tmp_path):
        with (
            small_files(),
            pytest.raises(DownloadError, match=r"the disk is full.*archive.tgz.part is kept: make room, and run this"),
        ):
            fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == {"archive.tgz.part"}
        assert (tmp_path / "archive.tgz.part").read_bytes() == ARCHIVE[:100_000]

    def test_and_then_there_is_room(self, server, tmp_path):
        (tmp_path / "archive.tgz.part").write_bytes(ARCHIVE[:100_000])
        fetch(source_of(server), tmp_path)
        assert everything(tmp_path) == WHOLE and server.asked == ["bytes=100000-"]

    def test_full_while_unpacking(self, server, tmp_path):
        content = tar_of((f"{INSIDE}/img/a.bin", bytes(200_000)))
        with small_files(), pytest.raises(DownloadError, match=r"the disk is full.*archive.tgz is kept"):
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
