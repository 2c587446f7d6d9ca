"""Videos frame by frame: files and streams, which PyAV decodes, and cameras, which OpenCV opens; and the video that is
written. Sound is ignored.

PyAV (FFmpeg) is the extra `video`. Its wheels come for Linux, macOS and Windows with all common decoders and with an
encoder for H.264, which OpenCV's wheels lack; and it knows the time of each frame. A camera has a number everywhere in
OpenCV, which is installed in any case, and a name of its own on each system in FFmpeg.

Legend: H, W size of a frame, upright.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from routeseg.data.decoding import MAX_PIXELS
from routeseg.errors import require
from routeseg.prediction.sources import HTTP, Source, file_name, is_url, locate

VIDEO_SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".wmv",
    ".flv",
    ".3gp",
)
LIVE = ("rtsp://", "rtsps://", "rtmp://", "srt://", "udp://", "rtp://")  # streams that do not wait for who reads them
FILE_PROTOCOLS, WEB_PROTOCOLS = "file", "http,https,tls,tcp"  # a video may name others, which are not opened
PATIENCE_S = 15.0  # for a stream to answer
ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that there is; the last one is no H.264
ENCODING = {"libx264": {"preset": "veryfast", "crf": "20"}}
TICKS = 90_000  # a second: times are kept to one of these
USUAL_RATE = 25  # frames a second, of a video that does not tell its own
CAMERA_FAILURES = 30  # in a row, before a camera counts as gone
BT709, LIMITED_RANGE = 1, 1  # how colours are written, in FFmpeg's numbers


class UnreadableVideo(ValueError):
    """What is no video, or one of which no frame can be decoded."""


class Frame(NamedTuple):
    """A frame as it is to be seen: uint8 [H,W,3] RGB, turned as the file says; and its time since the first one."""

    pixels: np.ndarray
    time_s: float


class Clip(Protocol):
    """A video that can be walked through once.

    live     frames come whether anybody waits for them or not
    frames   about how many there are; None: nobody knows
    rate     about how many there are in a second
    size     (H, W) of the first frame, once there was one
    aspect   width of a pixel through its height, for the first frame
    broken   frames so far that could not be decoded; lost: that nobody took in time
    """

    @property
    def source(self) -> Source: ...
    @property
    def live(self) -> bool: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def rate(self) -> Fraction: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def aspect(self) -> Fraction: ...
    @property
    def broken(self) -> int: ...
    @property
    def lost(self) -> int: ...

    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None: ...


def is_video(word: str) -> bool:
    """Whether a word names a video: by its suffix, or as a stream."""
    name = file_name(word if is_url(word) else Path(word))
    return is_stream(word) or PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def is_stream(word: Source) -> bool:
    return isinstance(word, str) and word.lower().startswith(LIVE)


def open_clip(source: Source, max_pixels: int = MAX_PIXELS) -> Clip:
    """The video of a file, a URL, or of a camera by its number ("0"); of a live one always the newest frame.

    Raises UnreadableVideo, naming it, if it is none or its frames have more than `max_pixels`, and ValueError if PyAV
    is missing.
    """
    if isinstance(source, str) and source.isdecimal():
        return Newest(Camera(int(source)))
    video = VideoFile(source, max_pixels)
    return Newest(video) if video.live else video


class VideoFile:
    """A file or stream, decoded by PyAV."""

    def __init__(self, source: Source, max_pixels: int = MAX_PIXELS) -> None:
        self._av = require("av", "video", "a video")
        self.source, self.max_pixels, self.live = source, max_pixels, is_stream(source)
        self.broken, self.lost = 0, 0
        try:
            self._container = self._av.open(**_address(source), metadata_errors="replace")
        except (OSError, self._av.FFmpegError) as error:
            raise UnreadableVideo(f"cannot read {source}: {_reason(error)}") from error
        streams = self._container.streams
        if not streams.video:
            alone = ", sound alone" if streams.audio else ""
            self._container.close()
            raise UnreadableVideo(f"{source} holds no video{alone}")
        self._stream = streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise UnreadableVideo(f"cannot read {source}: it is coded in a way that FFmpeg does not know")
        if not self.live:
            self._stream.thread_type = "AUTO"  # several frames at once; they come later, which only matters if live
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or USUAL_RATE)
        self.frames = self._count()
        self.aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        self._check(self._stream.codec_context.width, self._stream.codec_context.height)

    def _count(self) -> int | None:
        if self._stream.frames:
            return int(self._stream.frames)
        length = self._container.duration  # microseconds
        return None if self.live or not length else max(1, round(length / 1e6 * self.rate))

    def _check(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise UnreadableVideo(
                f"{self.source} has frames of {width}x{height}, more than {self.max_pixels} pixels: allow more with "
                "--max_pixels"
            )

    def __iter__(self) -> Iterator[Frame]:
        start, last = None, 0.0
        for frame in self._decoded():
            self._check(frame.width, frame.height)
            # What comes out of a decoder at the end lacks `frame.time`.
            now = last + 1 / float(self.rate) if frame.pts is None else float(frame.pts * self._stream.time_base)
            pixels, turns = frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)
            if turns % 4:
                pixels = np.ascontiguousarray(np.rot90(pixels, turns))
            if start is None:
                self.size = pixels.shape[:2]
                self.aspect = 1 / self.aspect if turns % 2 else self.aspect
            start, last = now if start is None else start, now
            yield Frame(pixels, now - start)

    def _decoded(self) -> Iterator[Any]:
        """The frames that are whole."""
        for packet in self._packets():
            try:
                frames = self._stream.codec_context.decode(packet)
            except self._av.EOFError:
                return
            except self._av.FFmpegError:
                self.broken += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self.broken += 1
                else:
                    yield frame

    def _packets(self) -> Iterator[Any]:
        """What is to be decoded; None has the decoder give what it still holds."""
        try:
            for packet in self._container.demux(self._stream):
                yield packet if packet.size else None
        except self._av.FFmpegError:  # the file cannot be read on
            self.broken += 1
            yield None

    def close(self) -> None:
        self._container.close()


class Camera:
    """A camera of this machine, by its number."""

    live, frames, lost, aspect = True, None, 0, Fraction(1)

    def __init__(self, number: int) -> None:
        self.source, self.broken = f"camera-{number}", 0
        before = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it tried in vain
        self._camera = cv2.VideoCapture(number)
        cv2.utils.logging.setLogLevel(before)
        if not self._camera.isOpened():
            raise UnreadableVideo(f"no camera {number}: check its number, and that no other program uses it")
        rate = self._camera.get(cv2.CAP_PROP_FPS)
        self.rate = Fraction(round(rate)) if rate >= 1 else Fraction(USUAL_RATE)

    def __iter__(self) -> Iterator[Frame]:
        start, failures = time.monotonic(), 0
        while failures < CAMERA_FAILURES:
            there, picture = self._camera.read()
            failures = 0 if there else failures + 1
            self.broken += not there
            if there:
                self.size = picture.shape[:2]
                yield Frame(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), time.monotonic() - start)

    def close(self) -> None:
        self._camera.release()


class Newest:
    """Of a live video the newest frame, whenever one is asked for: those that came meanwhile are lost, and counted. A
    thread reads them."""

    live = True

    def __init__(self, clip: Clip) -> None:
        self._clip, self.lost = clip, 0
        self.source, self.frames, self.rate = clip.source, clip.frames, clip.rate
        self._news = threading.Condition()
        self._frame: Frame | None = None
        self._ended = False
        self._error: Exception | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    @property
    def broken(self) -> int:
        return self._clip.broken

    @property
    def size(self) -> tuple[int, int]:
        return self._clip.size

    @property
    def aspect(self) -> Fraction:
        return self._clip.aspect

    def _read(self) -> None:
        try:
            for frame in self._clip:
                with self._news:
                    if self._ended:
                        return
                    self.lost += self._frame is not None
                    self._frame = frame
                    self._news.notify()
        except Exception as error:
            self._error = error
        with self._news:
            self._ended = True
            self._news.notify()

    def __iter__(self) -> Iterator[Frame]:
        self._reader.start()
        while True:
            with self._news:
                while self._frame is None and not self._ended:
                    self._news.wait()
                frame, self._frame = self._frame, None
            if frame is None:
                break
            yield frame
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._news:
            self._ended = True
        if self._reader.ident is not None:
            self._reader.join(PATIENCE_S)
        if not self._reader.is_alive():  # else it ends with the program
            self._clip.close()


class VideoWriter:
    """An MP4 file that grows by one image after another, uint8 [H,W,3], each at its own time: H.264 in yuv420p,
    as all browsers play it. A side that is odd grows by one pixel, as the format wants it.

    Raises OSError if the file cannot be written, and ValueError for a size that the encoder does not take.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction, aspect: Fraction = Fraction(1)) -> None:
        self._av = require("av", "video", "a video")
        self.size = size
        encoder = next(name for name in ENCODERS if name in self._av.codecs_available)
        self._container = self._av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream(encoder, rate=rate, options=ENCODING.get(encoder, {}))
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base, context.sample_aspect_ratio = Fraction(1, TICKS), aspect
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self._last = -1  # time of the last frame, in ticks

    def write(self, picture: np.ndarray, time_s: float) -> None:
        """An image of another size than the first is resized to it."""
        height, width = self.size
        if picture.shape[:2] != self.size:
            picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        if height % 2 or width % 2:
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        self._last = max(self._last + 1, round(time_s * TICKS))  # times that go back or stand still are none
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        try:
            self._container.mux(self._stream.encode(frame))
        except self._av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(
                f"cannot encode frames of {width}x{height} ({error}): leave the video out with --pictures false"
            ) from error

    def finish(self) -> None:
        """Writes what the encoder still holds, and the index."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def close(self) -> None:
        """Lets go of the file, whole or not."""
        self._container.close()


def _address(source: Source) -> dict[str, Any]:
    """What PyAV is asked to open. Raises UnreadableVideo for a store that FFmpeg does not know."""
    if isinstance(source, Path):
        return {"file": f"file:{locate(source)}", "options": {"protocol_whitelist": FILE_PROTOCOLS}}
    if is_stream(source):
        options = {"rtsp_transport": "tcp"} if source.lower().startswith("rtsp") else {}
        return {"file": source, "options": options, "timeout": PATIENCE_S}
    if source.lower().startswith(HTTP):
        return {"file": source, "options": {"protocol_whitelist": WEB_PROTOCOLS}, "timeout": PATIENCE_S}
    raise UnreadableVideo(f"cannot read {source}: videos come from files, http, and {', '.join(LIVE)}; copy it here")


def _reason(error: Exception) -> str:
    if "Invalid data" in str(error):
        return "it is no video, or a damaged one"
    return getattr(error, "strerror", None) or str(error)
