"""Downloading data sets from a server that breaks, lies or is not there."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run
from downloads import ARCHIVE, INSIDE, PICTURES, WHOLE, Serving, everything, fetch, source_of, tar_of, zip_of
from routeseg.data.sets.camvid import open_camvid
from routeseg.data.tools.archives import BadArchive
from routeseg.data.tools.download import SOURCES, TRIES, DownloadError, Source, check_camvid, download, parse_checksum


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

    def test_no_connection(self, server, tmp_path, monkeypatch):
        source = source_of(server, url="http://127.0.0.1:1/archive.tgz")
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it is tried again and again"))
        with pytest.raises(DownloadError, match="no connection to http://127.0.0.1:1/archive.tgz"):
            download(source, tmp_path)

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
