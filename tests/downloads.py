"""Archives, a server that breaks or lies when it is told to, and what a download from it leaves behind."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from routeseg.data.tools.download import Source, download

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


@contextmanager
def serve() -> Iterator[Serving]:
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
            serving.sent += len(body)  # before the client has them, and looks at it
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    serving.address = f"http://127.0.0.1:{http.server_address[1]}/archive.tgz"
    try:
        yield serving
    finally:
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
