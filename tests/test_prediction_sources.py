"""What inputs mean, on disks, in stores and in lists, and where results go."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from pictures import noise, save
from predicting import run, sharpen
from routeseg import files
from routeseg.prediction import sources
from routeseg.prediction.files import LABELS, OUTPUTS, OVERLAY
from routeseg.prediction.sources import find_inputs, other_inputs, output_names, read_bytes


@pytest.fixture
def network(tiny_network):
    return sharpen(tiny_network)


class TestFindInputs:
    @pytest.fixture(autouse=True)
    def _files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        images = ["b.png", "a.JPG", "c.webp", "f.psd", "sub/d.tiff", "sub/deep/e.bmp"]
        for name in (*images, "notes.txt", ".hidden.png"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "folder.png").mkdir()

    def found(self, *inputs: str) -> list[str]:
        return [path.as_posix() for path in find_inputs(inputs)]

    def test_files_keep_their_order(self):
        assert self.found("c.webp", "a.JPG") == ["c.webp", "a.JPG"]

    def test_a_named_file_may_have_any_suffix(self):
        assert self.found("notes.txt") == ["notes.txt"]

    def test_a_folder_gives_its_images_sorted_and_not_its_subfolders(self):
        assert self.found(".") == ["a.JPG", "b.png", "c.webp"]
        assert self.found("sub/") == ["sub/d.tiff"]

    def test_what_lies_beside_images_is_counted(self, tmp_path):
        (tmp_path / "x.heic").touch()
        (tmp_path / "sub" / "y.mov").touch()
        assert other_inputs(["sub", "b.png", "sub/*"]) == "1 .mov"
        assert "1 .heic" in other_inputs(["."])

    def test_globs(self):
        assert self.found("*") == ["a.JPG", "b.png", "c.webp"]
        assert self.found("**/*.bmp") == ["sub/deep/e.bmp"]
        assert self.found("sub/**") == ["sub/d.tiff", "sub/deep/e.bmp"]
        assert self.found("[bc].*") == ["b.png", "c.webp"]

    def test_a_glob_that_names_a_suffix_may_name_any(self):
        assert self.found("*.psd") == ["f.psd"]

    def test_a_file_whose_name_looks_like_a_glob(self, tmp_path):
        (tmp_path / "x[1].png").touch()
        assert self.found("x[1].png") == ["x[1].png"]

    def test_each_file_once_at_its_first_place(self, tmp_path):
        assert self.found("b.png", ".", "./b.png", str(tmp_path / "a.JPG")) == ["b.png", "a.JPG", "c.webp"]

    def test_a_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_inputs(["~/b.png"]) == [tmp_path / "b.png"]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("missing.png", "no file or folder missing.png"),
            ("empty", "the folder empty holds no images"),
            ("*.gif", r"\*\.gif matches 0 files"),
            ("notes*", r"notes\* matches 1 files, and no image"),
            ("", "an input is empty"),
        ],
    )
    def test_an_input_that_gives_nothing_is_named(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            find_inputs(["b.png", wrong])

    def test_no_input_at_all(self):
        with pytest.raises(ValueError, match="no images given"):
            find_inputs([])


class TestOutputNames:
    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["a/x.png", "y.jpg"], ["x", "y"]),
            (["x.png", "x.jpg", "y.png"], ["x.png", "x.jpg", "y"]),
            (["a/x.png", "b/x.png", "b/x.jpg"], ["x.png", "x.png-2", "x.jpg"]),
            (["x.png", "X.png"], ["x.png", "X.png-2"]),
            (["x.png", "x.jpg", "x.png.tif"], ["x.png", "x.jpg", "x.png-2"]),
            (["x.png-2.tif", "a/x.png", "b/x.png"], ["x.png-2", "x.png", "x.png-3"]),
        ],
    )
    def test_no_two_are_the_same(self, paths, names):
        assert output_names(map(Path, paths)) == names


class TestUrls:
    """Inputs and outputs in stores that are no disk: memory, and a web server."""

    @pytest.fixture
    def store(self):
        """A bucket of its own in memory."""
        files = fsspec.filesystem("memory")
        files.rm("/bucket", recursive=True) if files.exists("/bucket") else None
        for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.png", "d.psd"):
            files.pipe_file(f"/bucket/{name}", b"")
        return files

    def test_files_folders_and_globs(self, store):
        assert find_inputs(["memory://bucket/b.png"]) == ["memory://bucket/b.png"]
        assert find_inputs(["memory://bucket/notes.txt"]) == ["memory://bucket/notes.txt"]
        assert find_inputs(["memory://bucket"]) == ["memory://bucket/a.JPG", "memory://bucket/b.png"]
        assert find_inputs(["memory://bucket/"]) == find_inputs(["memory://bucket"])
        assert find_inputs(["memory://bucket/*"]) == find_inputs(["memory://bucket"])
        assert find_inputs(["memory://bucket/*.psd"]) == ["memory://bucket/d.psd"]
        assert find_inputs(["memory://bucket/**"])[-1] == "memory://bucket/sub/c.png"

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("memory://nowhere/", "nothing at memory://nowhere/"),
            ("memory://bucket/*.gif", r"\*\.gif matches 0 files"),
            ("memory://bucket/notes*", r"notes\* matches 1 files, and no image"),
            ("nonsense://x/*.png", "cannot open nonsense://x/.*nonsense"),
            ("s3://bucket/*.png", "cannot open s3://bucket/.*s3fs"),
        ],
    )
    def test_one_that_gives_nothing_is_named(self, store, monkeypatch, wrong, message):
        monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
        with pytest.raises(ValueError, match=message):
            find_inputs([wrong])

    def test_a_file_url_is_a_path(self, tmp_path):
        path = save(tmp_path / "a.png", noise(8, 8))
        assert find_inputs([f"file://{path}", str(path), f"file://{tmp_path}/*.png"]) == [path]

    def test_names_come_from_the_last_part(self):
        urls = ["https://x.org/a/street%201.png?size=2&b=c/d", "s3://bucket/b/x.png", "memory://c/x.png", Path("y.png")]
        assert output_names(urls) == ["street 1", "x.png", "x.png-2", "y"]

    def test_from_memory_to_memory_and_resumed(self, network, store, tmp_path):
        images = [noise(32, 64, seed) for seed in range(2)]
        for image, name in zip(images, "ab", strict=True):
            store.pipe_file(f"/bucket/in/{name}.png", save(tmp_path / f"{name}.png", image).read_bytes())
        urls = find_inputs(["memory://bucket/in/*.png"])
        summary = run(network, urls, "memory://bucket/out")
        assert [p.name for p in summary.predictions] == ["a", "b"] and summary.output == "memory://bucket/out"
        run(network, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")
        names = sorted(Path(name).name for name in store.ls("/bucket/out", detail=False))
        assert names == sorted(f"{name}{end}" for name in "ab" for end in OUTPUTS)
        for name in names:
            remote, local = store.cat_file(f"/bucket/out/{name}"), (tmp_path / "out" / name).read_bytes()
            if name.endswith(".json"):
                assert json.loads(remote) | {"image": ""} == json.loads(local) | {"image": ""}
            else:
                assert remote == local
        store.rm_file("/bucket/out/b_route.json")
        before = store.modified("/bucket/out/a_labels.png")
        again = run(network, urls, "memory://bucket/out", resume=True)
        assert again.resumed == 1 and again.predictions == summary.predictions
        assert store.modified("/bucket/out/a_labels.png") == before
        assert store.exists("/bucket/out/b_route.json")

    def test_names_with_the_signs_of_a_glob_are_resumed(self, network, store, tmp_path):
        paths = [save(tmp_path / f"{name}.png", noise(32, 64, k)) for k, name in enumerate(("a[1]", "a1", "b*", "[c"))]
        run(network, paths[:3], "memory://bucket/out", pictures=False)
        again = run(network, paths, "memory://bucket/out", resume=True, pictures=False)
        assert again.resumed == 3 and [p.image for p in again.predictions] == paths

    def test_an_image_is_never_overwritten_by_a_result(self, network, store):
        urls = ["memory://bucket/x.png", "memory://bucket/x_labels.png"]
        with pytest.raises(ValueError, match="x_labels.png is itself an input"):
            run(network, urls, "memory://bucket")

    def test_a_store_that_takes_nothing_is_named(self, network, tmp_path, monkeypatch, store):
        def refuse(self, path, data, **_):
            raise PermissionError("AccessDenied: you may not put objects here")

        monkeypatch.setattr(type(store), "pipe_file", refuse)
        path = save(tmp_path / "a.png", noise(32, 64))
        with pytest.raises(ValueError, match="cannot write into memory://bucket/out: AccessDenied.*--output"):
            run(network, [path], "memory://bucket/out")

    def test_a_store_with_folders(self, network, tmp_path):
        """`dir::` is a store of its own, in which a folder must be made."""
        path = save(tmp_path / "a.png", noise(32, 64))
        (tmp_path / "root").mkdir()
        run(network, [path], f"dir://out::file://{tmp_path}/root")
        assert {p.name for p in (tmp_path / "root" / "out").iterdir()} == {f"a{end}" for end in OUTPUTS}

    def test_a_web_server(self, network, tmp_path, web_server):
        save(tmp_path / "in" / "a.png", noise(32, 64))
        save(tmp_path / "in" / "b.png", noise(32, 64, 1))
        (tmp_path / "in" / "c.png").write_bytes(b"no image")
        address = web_server(tmp_path / "in")
        urls = find_inputs([f"{address}/*.png"])
        assert urls == [f"{address}/{name}.png" for name in "abc"] == find_inputs([f"{address}/"])
        summary = run(network, [*urls, f"{address}/gone.png"], tmp_path / "out")
        assert [p.image for p in summary.predictions] == urls[:2]
        assert [skip.image for skip in summary.skipped] == [urls[2], f"{address}/gone.png"]
        assert "no image" in summary.skipped[0].reason and "0x" not in summary.skipped[0].reason
        run(network, [tmp_path / "in" / "a.png"], tmp_path / "local")
        for end in (LABELS, OVERLAY):
            assert (tmp_path / "out" / f"a{end}").read_bytes() == (tmp_path / "local" / f"a{end}").read_bytes()

    def test_a_web_server_that_is_gone(self, network, tmp_path):
        summary = run(network, ["http://127.0.0.1:9/a.png"], tmp_path / "out")
        assert "cannot read http://127.0.0.1:9/a.png" in summary.skipped[0].reason
        with pytest.raises(ValueError, match="cannot list http://127.0.0.1:9/"):
            find_inputs(["http://127.0.0.1:9/*.png"])


class TestLists:
    def test_a_list_holds_what_the_command_line_may(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a.png", "in/b.png", "in/c.png"):
            save(tmp_path / name, noise(8, 8))
        Path("list.txt").write_text("# comment\n\n  in/c.png \r\nin\nhttps://x.org/y.png\n")
        expected = [Path("in/c.png"), Path("in/b.png"), "https://x.org/y.png"]
        assert find_inputs(["a.png", "@list.txt", "in/b.png"]) == [Path("a.png"), *expected]
        Path("list.txt").write_text("in\n", encoding="utf-8-sig")
        assert find_inputs(["@list.txt"]) == expected[1::-1]
        fsspec.filesystem("memory").pipe_file("/bucket/list.txt", b"a.png")
        assert find_inputs(["@memory://bucket/list.txt"]) == [Path("a.png")]

    def test_a_name_that_is_not_utf8(self, network, tmp_path):
        name = os.fsdecode(b"caf\xe9.png")
        try:
            save(tmp_path / name, noise(32, 64))
        except OSError:
            pytest.skip("this disk takes UTF-8 names only")
        (tmp_path / "list.txt").write_bytes(os.fsencode(tmp_path) + b"/caf\xe9.png\n")
        paths = find_inputs([f"@{tmp_path}/list.txt"])
        assert paths == [tmp_path / name]
        summary = run(network, paths, tmp_path / "out")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {f"caf\ufffd{end}" for end in OUTPUTS}
        data = json.loads((tmp_path / "out" / "caf\ufffd_route.json").read_text())
        assert data["image"] == str(paths[0]) and summary.predictions[0].image == paths[0]
        assert run(network, paths, tmp_path / "out", resume=True).resumed == 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.png\nmissing.png\n", r"list\.txt, line 2: no file or folder missing.png"),
            ("# nothing\n", "names no images"),
            ("@other.txt\n", "line 1: a list cannot name a list"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_line(self, tmp_path, monkeypatch, text, message):
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "a.png", noise(8, 8))
        Path("list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_inputs(["@list.txt"])

    def test_no_list(self, tmp_path):
        with pytest.raises(ValueError, match="cannot read the list .*list.txt: No such file"):
            find_inputs([f"@{tmp_path}/list.txt"])


class TestLimits:
    """What comes is never larger than the limit, decompressed, and never takes longer."""

    LIMIT = 1 << 20

    @pytest.fixture
    def hostile(self):
        """hostile(headers, body) -> address of a server that answers so; the body is blocks of bytes."""
        servers = []

        def start(headers: dict[str, str], body: Iterable[bytes]) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(206 if "Range" in self.headers else 200)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    with suppress(OSError):
                        for block in body:
                            self.wfile.write(block)

                def do_HEAD(self):
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.send_header("Accept-Ranges", "bytes")
                    self.end_headers()

                def log_message(self, *_):
                    pass

            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
            return f"http://127.0.0.1:{server.server_port}/a.png"

        yield start
        for server in servers:
            server.shutdown()
            server.server_close()

    @pytest.mark.parametrize("encoding", ["endless", "length", "gzip", "deflate", "br"])
    def test_a_body_without_end(self, hostile, encoding):
        headers, body = {}, itertools.repeat(bytes(1 << 16))
        if encoding == "length":
            headers = {"Content-Length": str(1 << 40)}
        elif encoding != "endless":
            headers, data = {"Content-Encoding": encoding}, bytes(64 * self.LIMIT)
            if encoding == "br":
                data = pytest.importorskip("brotli").compress(data)
            else:
                data = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
            assert len(data) < self.LIMIT
            body = [data]
        with pytest.raises(OSError, match="more than 1.049 MB"):
            read_bytes(hostile(headers, body), self.LIMIT)

    def test_what_a_chain_of_stores_reads(self, hostile):
        with pytest.raises(ValueError, match="cannot open zip:.*not a zip file"):  # as zipfile says it
            read_bytes("zip://a.png::" + hostile({}, itertools.repeat(bytes(1 << 16))), self.LIMIT)

    def test_a_list_of_files_without_end(self, hostile, monkeypatch):
        monkeypatch.setattr(sources._open_store, "__defaults__", (self.LIMIT,))
        with pytest.raises(ValueError, match="cannot list http.*more than 1.049 MB"):
            find_inputs([hostile({"Content-Type": "text/html"}, itertools.repeat(bytes(1 << 16))).replace("a", "*")])

    def test_a_body_that_drips(self, hostile, monkeypatch):
        def drip():
            while True:
                yield b"x"
                time.sleep(0.02)

        monkeypatch.setattr(sources, "MAX_READ_SECONDS", 0.3)
        monkeypatch.setattr(files, "MAX_READ_SECONDS", 0.3)
        with pytest.raises(OSError, match="did not come within 0.3 s"):
            read_bytes(hostile({}, drip()), self.LIMIT + 1)  # its session is a new one

    def test_other_stores(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", bytes(4 * self.LIMIT))
        fsspec.filesystem("memory").pipe_file("/bucket/large.png", bytes(self.LIMIT + 1))
        (tmp_path / "a.png").write_bytes(bytes(self.LIMIT + 1))
        wrong = ["memory://bucket/large.png", f"zip://a.png::{tmp_path}/a.zip", tmp_path / "a.png", Path("/dev/zero")]
        for source in wrong:
            with pytest.raises(OSError, match="more than 1.049 MB"):
                read_bytes(source, self.LIMIT)
            assert len(read_bytes(source, 5 * self.LIMIT)) > self.LIMIT if source != Path("/dev/zero") else True

    def test_an_image_of_the_command(self, network, hostile, tmp_path):
        url = hostile({}, itertools.repeat(bytes(1 << 16)))
        summary = run(network, [url, save(tmp_path / "a.png", noise(32, 64))], tmp_path / "out", max_pixels=10_000)
        assert [skip.reason for skip in summary.skipped] == [
            f"cannot read {url}: it has more than 0.04 MB, the most that is read"
        ]
        assert len(summary.predictions) == 1
