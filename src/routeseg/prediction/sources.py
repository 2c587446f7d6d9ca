"""Large collections of images: which images an input means, and where results go; on disks and in remote stores.

A `Source` is one image: the Path of a file, or a str, the URL of an object in any store that fsspec knows
(s3://, gs://, https://, ...). Most stores need a package of their own; the error names it.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from routeseg.data.decoding import IMAGE_SUFFIXES
from routeseg.data.pairs import other_files
from routeseg.files import (
    MAX_READ_BYTES,
    MAX_READ_SECONDS,
    check_writable,
    expand_user,
    read_file,
    read_up_to,
    too_large,
    too_slow,
    write_atomically,
)

Source = Path | str

LIST_SIGN, COMMENT = "@", b"#"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
GLOB_SIGNS = "*?["
HTTP = ("http://", "https://")
READ_AT_ONCE = 500  # objects of a remote store


def find_inputs(inputs: Sequence[str]) -> list[Source]:
    """The images that these words mean, each once, in the order given.

    A file is taken as it is, whatever its suffix. A folder gives the images in it (IMAGE_SUFFIXES), sorted, without
    hidden ones and those in its subfolders. Anything else is a glob (`**` goes through folders), sorted too; it gives
    images, or any file if it names a suffix itself (`*.raw`). URLs mean the same in their store; one that ends
    like an image is taken without a look at the store. `@LIST` is a text file, or a URL of one, with such a word on
    each line; lines that are empty or start with # are passed over.

    Raises ValueError, naming the input, if it gives nothing.
    """
    if not inputs:
        raise ValueError("no images given: name image files, folders, globs or URLs")
    found: dict[str, Source] = {}
    for text in inputs:
        for source in _expand(text):
            found.setdefault(str(locate(source)), source)
    return list(found.values())


def other_inputs(inputs: Sequence[str]) -> str:
    """What lies beside the images in the folders among these words, by suffix; "" if nothing does."""
    folders = [folder for folder in map(expand_user, inputs) if folder.is_dir()]
    return other_files(path.name for folder in folders for path in folder.iterdir() if path.is_file())


def output_names(sources: Iterable[Source]) -> list[str]:
    """NAME of each image, as its results are called: its file name without the suffix.

    Images that share it keep their suffix (`x.png`, `x.jpg`), and if even that is the same (`a/x.png`, `b/x.png`), the
    later ones get a number (`x.png-2`). No two names are the same, even if case does not count, and the same sources
    always give the same names. Bytes of a file name that are not UTF-8 become U+FFFD.
    """
    files = [PurePosixPath(_utf8(file_name(source))) for source in sources]
    stems = Counter(file.stem.casefold() for file in files)
    names: list[str] = []
    taken: set[str] = set()
    tried: Counter[str] = Counter()
    for file in files:
        wanted = file.stem if stems[file.stem.casefold()] == 1 else file.name
        name, number = wanted, tried[wanted.casefold()] or 1
        while name.casefold() in taken:
            number += 1
            name = f"{wanted}-{number}"
        tried[wanted.casefold()] = number
        taken.add(name.casefold())
        names.append(name)
    return names


def is_url(text: Source) -> bool:
    """Whether this is a URL; a Path never is one."""
    return isinstance(text, str) and URL.match(text) is not None


def file_name(source: Source) -> str:
    """The last part of a path or URL; of http URLs without query and quoting."""
    if isinstance(source, Path):
        return source.name
    first = source.split("::")[0]
    path = unquote(urlsplit(first).path) if first.startswith(HTTP) else first
    return path.rstrip("/").rsplit("/", 1)[-1]


def locate(source: Source) -> Source:
    """The absolute path, or the URL: what a process in another folder needs."""
    return source if isinstance(source, str) else Path(os.path.abspath(source))


def read_bytes(source: Source, limit: int = MAX_READ_BYTES) -> bytes:
    """What the file or object holds, once it is decompressed. Raises OSError, of whatever kind, if it cannot be read,
    has more than `limit` bytes, or takes too long."""
    if isinstance(source, Path):
        return read_file(source, limit)
    store, path = _open_store(source, limit)
    try:
        if source.startswith(HTTP):
            return store.cat_file(path)  # within the limits of `_web_session`
        if store.async_impl:
            data = store.cat_file(path, start=0, end=limit + 1)
            if len(data) > limit:
                raise too_large(limit)
            return data
        with store.open(path, "rb") as file:
            return read_up_to(file, limit)
    except Exception as error:  # every store has errors of its own
        raise OSError(_reason(error)) from error


class ResultFolder(Protocol):
    """A place for files of results: a folder on a disk, or in a remote store."""

    def prepare(self) -> None:
        """Makes the folder. Raises ValueError if that fails."""
        ...

    def locate(self, name: str) -> str:
        """Absolute path or URL of a file in it."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole or not at all. Raises ValueError if that fails."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        ...

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of those files that exist."""
        ...


class LocalFolder:
    """Results on a disk: a file gets its name once it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.name = str(folder)

    def __str__(self) -> str:
        return self.name

    def prepare(self) -> None:
        check_writable(self.name)

    def locate(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.folder / name, data)
        except OSError as error:
            raise _cannot_write(self.name, os.strerror(error.errno or 0)) from error

    def remove(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.name, os.strerror(error.errno or 0)) from error

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            try:
                yield name, (self.folder / name).read_bytes()
            except FileNotFoundError:
                pass


class RemoteFolder:
    """Results in a remote store: every object is put in one piece."""

    def __init__(self, url: str) -> None:
        self.store, self.path = _open_store(url)
        self.name = url.rstrip("/")
        self.path = self.path.rstrip("/")

    def __str__(self) -> str:
        return self.name

    def prepare(self) -> None:
        """Nothing: most stores know no folders, and the first write tells whether they take anything."""

    def locate(self, name: str) -> str:
        return _url_of(self.name, self.store, self.path, f"{self.path}/{name}")

    def write(self, name: str, data: bytes) -> None:
        try:
            try:
                self.store.pipe_file(f"{self.path}/{name}", data)
            except FileNotFoundError:  # a store with folders; makes this one alone, and so never a bucket
                self.store.mkdir(self.path, create_parents=False)
                self.store.pipe_file(f"{self.path}/{name}", data)
        except Exception as error:  # every store has errors of its own
            raise _cannot_write(self.name, _reason(error)) from error

    def remove(self, name: str) -> None:
        try:
            self.store.rm_file(f"{self.path}/{name}")
        except Exception:  # it does not exist, or the store lets nobody remove; the write after it will tell
            pass

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for start in range(0, len(names), READ_AT_ONCE):
            some = {f"{self.path}/{name}": name for name in names[start : start + READ_AT_ONCE]}
            for path, content in self._fetch(list(some)).items():
                if isinstance(content, bytes):
                    yield some[path], content
                elif not isinstance(content, FileNotFoundError | KeyError):
                    raise ValueError(f"cannot read {self.name}: {_reason(content)}. Choose another --output")

    def _fetch(self, paths: Sequence[str]) -> dict[str, bytes | Exception]:
        """Path -> content, or why there is none. A path with signs of a glob is fetched alone: `cat` would match it."""
        plain = [path for path in paths if not glob.has_magic(path)]
        found: dict[str, bytes | Exception] = self.store.cat(plain, on_error="return") if plain else {}
        for path in paths:
            if glob.has_magic(path):
                try:
                    found[path] = self.store.cat_file(path)
                except Exception as error:  # every store has errors of its own
                    found[path] = error
        return found


def open_folder(output: Source) -> LocalFolder | RemoteFolder:
    """The place that this path or URL names. Raises ValueError for a store that is not known, or not installed."""
    if isinstance(output, Path) or not is_url(output):
        return LocalFolder(expand_user(output))
    store, path = _open_store(output)
    return LocalFolder(Path(path)) if isinstance(store, LocalFileSystem) else RemoteFolder(output)


def _expand(text: str) -> list[Source]:
    if not text:
        raise ValueError("an input is empty: name an image file, a folder, a glob or a URL")
    if text.startswith(LIST_SIGN):
        return _expand_list(text.removeprefix(LIST_SIGN))
    if not is_url(text):
        return list(_expand_path(expand_user(text)))
    store, path = _open_store(text)
    if isinstance(store, LocalFileSystem):
        return list(_expand_path(Path(path)))
    return list(_expand_url(text, store, path))


def _expand_list(name: str) -> list[Source]:
    source = name if is_url(name) else expand_user(name)
    try:
        lines = read_bytes(source).removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the list {name}: {error.strerror or error}") from error
    found: list[Source] = []
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if not word or word.startswith(COMMENT):
            continue
        try:
            if word.startswith(LIST_SIGN.encode()):
                raise ValueError("a list cannot name a list: give both on the command line")
            found += _expand(os.fsdecode(word))
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"the list {name} names no images: it needs a file or URL on each line")
    return found


def _expand_path(path: Path) -> list[Path]:
    known = ", ".join(IMAGE_SUFFIXES)
    if path.is_file():
        return [path]
    if path.is_dir():
        try:
            candidates = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise ValueError(f"cannot read the folder {path}: {error.strerror}") from error
        images = [p for p in candidates if _is_image(p.name) and p.is_file()]
        if not images:
            others = other_files(p.name for p in candidates if p.is_file())
            there = f", but {others}" if others else ""
            raise ValueError(f"the folder {path} holds no images ({known}){there}; its subfolders: '{path}/**'")
        return images
    if not glob.has_magic(str(path)):
        raise ValueError(f"no file or folder {path}: check the name")
    files = [file for file in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(file)]
    return [Path(file) for file in _matching(str(path), path.name, files)]


def _expand_url(url: str, store: Any, path: str) -> list[str]:
    name = file_name(url)
    signs = GLOB_SIGNS.replace("?", "") if url.startswith(HTTP) else GLOB_SIGNS  # there ? starts a query
    magic = any(sign in path for sign in signs)
    if not magic and _is_image(name):
        return [url]
    try:
        if magic:
            entries = store.glob(path, detail=True)
        elif store.isdir(path):
            entries = {entry["name"]: entry for entry in store.ls(path, detail=True)}
        else:
            entries = None
            exists = store.exists(path)
    except Exception as error:  # every store has errors of its own
        raise ValueError(f"cannot list {url}: {_reason(error)}") from error
    if entries is None:
        if not exists:
            raise ValueError(f"nothing at {url}: check the name")
        return [url]
    files = sorted(file for file, entry in entries.items() if entry.get("type") != "directory")
    files = [file for file in files if not file_name(file).startswith(".")]
    if magic:
        chosen = _matching(url, name, files)
    else:
        chosen = [file for file in files if _is_image(file_name(file))]
        if not chosen:
            raise ValueError(f"{url} holds no images ({', '.join(IMAGE_SUFFIXES)}); its subfolders: '{url}/**'")
    return [_url_of(url, store, path, file) for file in chosen]


def _matching(pattern: str, last: str, files: Sequence[str]) -> list[str]:
    """Those files that a glob means, of all that it gave: images, or every file if its last part names a suffix.

    Raises ValueError if it means none.
    """
    suffix = PurePosixPath(last).suffix
    named = suffix and not glob.has_magic(suffix)
    chosen = [file for file in files if named or _is_image(file_name(file))]
    if not chosen:
        known = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"{pattern} matches {len(files)} files, and no image ({known}): check the pattern")
    return chosen


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _open_store(url: str, limit: int = MAX_READ_BYTES) -> tuple[Any, str]:
    """The store of a URL, and what it calls the object; no answer of a web server is longer than `limit`. Raises
    ValueError if the store is not known or not installed."""
    web = {part.partition("://")[0] for part in url.split("::") if part.startswith(HTTP)}
    try:
        return fsspec.core.url_to_fs(url, **{name: {"get_client": partial(_web_session, limit)} for name in web})
    except Exception as error:  # an unknown protocol, a missing package, no credentials
        raise ValueError(f"cannot open {url}: {_reason(error)}") from error


async def _web_session(limit: int, **options: Any) -> Any:
    """aiohttp's session for fsspec, in which no answer is longer than `limit`, decompressed, or takes too long."""
    import aiohttp

    class Answer(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:  # as aiohttp keeps it
                if (self.content_length or 0) > limit:
                    raise too_large(limit)
                blocks, left = list[bytes](), limit
                async for block in self.content.iter_any():
                    left -= len(block)
                    if left < 0:
                        self.close()
                        raise too_large(limit)
                    blocks.append(block)
                self._body = b"".join(blocks)
            return await super().read()

    timeout = aiohttp.ClientTimeout(total=MAX_READ_SECONDS)
    return aiohttp.ClientSession(response_class=Answer, timeout=timeout, **options)


def _url_of(url: str, store: Any, path: str, other: str) -> str:
    """The URL of `other`, given the `url` of `path`: with its host, and with the stores behind `::`."""
    first, chain, rest = url.partition("::")
    first = first.rstrip("/")
    path = path.rstrip("/")
    first = first[: len(first) - len(path)] + other if first.endswith(path) else store.unstrip_protocol(other)
    return first + chain + rest


def _cannot_write(folder: str, reason: str) -> ValueError:
    return ValueError(
        f"cannot write into {folder}: {reason}. Choose another --output, or mend this one and go on with --resume"
    )


def _reason(error: Exception) -> str:
    """An error of a disk or a store in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, TimeoutError):
        return str(too_slow().strerror)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _utf8(text: str) -> str:
    return os.fsencode(text).decode(errors="replace")
