"""Videos: read, segmented frame by frame, written; and what the command says of them. No time is asserted."""

import csv
import json
import sys
import threading
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run, spread_gates
from pictures import noise, save, truncate
from routeseg import DynamicRoutingNetwork, figures
from routeseg.budgets.budgeted import Steered
from routeseg.prediction import clips
from routeseg.prediction.clips import Frame, Newest, UnreadableVideo, VideoFile, VideoWriter, is_video, open_clip
from routeseg.prediction.files import effort_of, segment
from routeseg.prediction.torch_runner import TorchNetwork
from routeseg.prediction.video import FramePace, predict_video

SIZE = (48, 64)
EXITS = {"depth": 3, "gate": "fixed", "route": "diagonal", "exits": [0, 1]}
UNEVEN = (0.0, 0.04, 0.28, 0.3, 0.34, 1.2)  # seconds


def network(**options):
    return spread_gates(DynamicRoutingNetwork(num_classes=5, base_channels=8, stem_channels=8, **options)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A network with exits, that was never calibrated."""
    return str(network(**EXITS).save(tmp_path_factory.mktemp("net")))


def pictures(count, size=SIZE):
    """Plain ones with a bright left upper corner, brighter from one to the next."""
    found = []
    for number in range(count):
        picture = np.full((*size, 3), 40 + 15 * (number % 8), np.uint8)
        picture[: size[0] // 2, : size[1] // 2] = (220, 60, 30)
        found.append(picture)
    return found


def write_video(path: Path, times=UNEVEN, size=SIZE, turned=None, sound=False, codec="libx264", aspect=1) -> Path:
    """A video of such images at these times, H.264 in even sizes."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"g": "4", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if codec == "libx264" else 25)
        stream.codec_context.sample_aspect_ratio = aspect
        if turned is not None:
            stream.set_display_rotation(turned)
        tone = file.add_stream("aac", rate=16000) if sound else None
        for time, picture in zip(times, pictures(len(times), size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round(time / stream.codec_context.time_base)
            frame.time_base = stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if tone is not None:
            write_tone(file, tone)
    return path


def write_tone(file, stream):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def read_video(path):
    """(images, times) of a file, by PyAV alone."""
    with av.open(str(path)) as file:
        frames = list(file.decode(file.streams.video[0]))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames]


def segmented(path, output, model=None, frame_ms=None, **options):
    """The summary of a video, and the rows of its table."""
    model = model or network(depth=3)
    forward = model if frame_ms is None else Steered(model, model)
    pace = None if frame_ms is None else FramePace(forward, frame_ms)
    summary = predict_video(TorchNetwork(forward, model), open_clip(path), output, "clip", pace=pace, **options)
    return summary, list(csv.DictReader((output / "clip_frames.csv").read_text().splitlines()))


class TestReading:
    def test_frames_come_at_their_times(self, tmp_path):
        frames = list(open_clip(write_video(tmp_path / "a.mp4", sound=True)))
        assert [frame.time_s for frame in frames] == pytest.approx(UNEVEN, abs=2e-3)
        for frame, expected in zip(frames, pictures(len(UNEVEN)), strict=True):
            assert frame.pixels.dtype == np.uint8 and np.abs(frame.pixels.astype(int) - expected).mean() < 8

    @pytest.mark.parametrize("turned", [90, -90, 180, 0])
    def test_turned_as_the_file_says(self, tmp_path, turned):
        """As OpenCV turns it."""
        path = write_video(tmp_path / "a.mp4", turned=turned, aspect=Fraction(2))
        clip = open_clip(path)
        pixels = next(iter(clip)).pixels
        _, expected = cv2.VideoCapture(str(path)).read()
        assert pixels.shape == (SIZE[::-1] if turned % 180 else SIZE) + (3,) and clip.size == pixels.shape[:2]
        assert np.abs(pixels.astype(int) - expected[..., ::-1]).mean() < 1
        assert clip.aspect == (Fraction(1, 2) if turned % 180 else 2)

    @pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mov", "a.webm", "a.ts"])
    def test_other_formats(self, tmp_path, name):
        codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
        write_video(tmp_path / name, [n / 25 for n in range(5)], codec=codec)
        frames = list(open_clip(tmp_path / name))
        assert [frame.time_s for frame in frames] == pytest.approx([n / 25 for n in range(5)], abs=2e-3)

    def test_broken_frames_are_counted(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", [n / 25 for n in range(24)], size=(240, 320))
        with av.open(str(path)) as file:
            packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
        data = bytearray(path.read_bytes())
        for place, size in packets[8:11]:
            data[place + 4 : place + size] = bytes(255 for _ in range(size - 4))
        path.write_bytes(data)
        clip = open_clip(path)
        times = [frame.time_s for frame in clip]
        assert 3 <= clip.broken and len(times) + clip.broken >= 20 and times == sorted(times)
        assert times[0] == 0 and times[-1] == pytest.approx(23 / 25)

    def test_a_file_that_ends_too_early(self, tmp_path):
        path = write_video(tmp_path / "a.mkv", [n / 25 for n in range(24)], size=(240, 320))
        clip = open_clip(truncate(path))
        assert 0 < len(list(clip)) < 24
        with pytest.raises(UnreadableVideo, match="it is no video, or a damaged one"):
            open_clip(truncate(write_video(tmp_path / "a.mp4")))

    def test_a_file_that_cannot_be_read_on(self, tmp_path):
        """What was read until then is not lost."""
        clip = open_clip(write_video(tmp_path / "a.mp4"))

        class Breaking:
            def __init__(self, container):
                self.container = container

            def demux(self, stream):
                for number, packet in enumerate(self.container.demux(stream)):
                    if number == 4:
                        raise av.InvalidDataError(1, "broken")
                    yield packet

        clip._container = Breaking(clip._container)
        assert len(list(clip)) == 4 and clip.broken == 1

    def test_what_is_no_video(self, tmp_path):
        (tmp_path / "a.mp4").write_bytes(b"no video at all" * 50)
        with pytest.raises(UnreadableVideo, match="cannot read .*a.mp4: it is no video, or a damaged one"):
            open_clip(tmp_path / "a.mp4")
        with pytest.raises(UnreadableVideo, match="cannot read .*b.mp4: No such file"):
            open_clip(tmp_path / "b.mp4")
        with av.open(str(tmp_path / "c.mp4"), "w") as file:
            write_tone(file, file.add_stream("aac", rate=16000))
        with pytest.raises(UnreadableVideo, match="c.mp4 holds no video, sound alone"):
            open_clip(tmp_path / "c.mp4")
        with pytest.raises(UnreadableVideo, match="frames of 64x48, more than 3000 pixels"):
            open_clip(write_video(tmp_path / "d.mp4"), max_pixels=3000)
        with pytest.raises(UnreadableVideo, match="videos come from files, http"):
            open_clip("s3://bucket/a.mp4")

    def test_a_video_opens_no_other_files(self, tmp_path):
        """A list of parts that calls itself .mp4."""
        write_video(tmp_path / "a.ts", [n / 25 for n in range(5)])
        (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile 'http://127.0.0.1:9/a.ts'\nfile {tmp_path}/a.ts\n")
        with pytest.raises(UnreadableVideo):
            open_clip(tmp_path / "b.mp4")

    def test_names(self):
        for word in ("a.mp4", "b/A.MOV", "rtsp://camera/1", "https://host/a.webm?token=x.y", "c.ts"):
            assert is_video(word), word
        for word in ("a.jpg", "mp4", "https://host/a.png", "s3://bucket/folder", "folder", "a.gif"):
            assert not is_video(word), word


class TestLive:
    def test_the_newest_frame(self):
        """What comes while another one is worked on is lost, and counted."""
        taken = threading.Event()

        class Source:
            source, live, frames, rate, size, aspect, broken, lost = (
                "s",
                True,
                None,
                Fraction(5),
                SIZE,
                Fraction(1),
                2,
                0,
            )
            closed = False

            def __iter__(self):
                yield Frame(np.zeros((1, 1, 3), np.uint8), 0.0)
                taken.wait(10)
                for number in range(1, 5):
                    yield Frame(np.zeros((1, 1, 3), np.uint8), float(number))

            def close(self):
                self.closed = True

        source = Source()
        clip = Newest(source)
        frames = iter(clip)
        assert next(frames).time_s == 0
        taken.set()
        clip._reader.join(10)
        assert [frame.time_s for frame in frames] == [4] and clip.lost == 3 and clip.broken == 2
        clip.close()
        assert source.closed

    def test_an_error_reaches_who_waits(self):
        class Source(VideoFile):
            def __init__(self):
                self.source, self.frames, self.rate = "s", None, 5

            def __iter__(self):
                raise UnreadableVideo("gone")
                yield

        with pytest.raises(UnreadableVideo, match="gone"):
            next(iter(Newest(Source())))

    @pytest.fixture
    def camera(self, monkeypatch):
        """What OpenCV opens: number 0 has 5 images, the third of which fails; no other is there."""

        class Capture:
            def __init__(self, number):
                self.number, self.left = number, [(True, noise(*SIZE)), (True, noise(*SIZE)), (False, None)]

            def isOpened(self):
                return self.number == 0

            def get(self, what):
                return 30.0

            def read(self):
                return self.left.pop(0) if self.left else (False, None)

            def release(self):
                pass

        monkeypatch.setattr(clips.cv2, "VideoCapture", Capture)

    def test_a_camera(self, camera, checkpoint, tmp_path, capsys):
        code, out, err = run(["predict", checkpoint, "--source", "0", "--output", tmp_path / "out"], capsys)
        assert code == 0 and "camera-0" in out and not err
        found = json.loads((tmp_path / "out" / "camera-0_summary.json").read_text())
        assert found["frames"] + found["lost"] == 2 and found["broken"] == clips.CAMERA_FAILURES
        code, _, err = run(["predict", checkpoint, "--source", "1", "--output", tmp_path / "out"], capsys)
        assert code == 2 and "no camera 1" in err


class TestWriting:
    @pytest.mark.parametrize("size", [SIZE, (47, 63), (17, 9), (2, 2)])
    def test_times_sizes_and_colours(self, tmp_path, size):
        path = tmp_path / "a.mp4"
        writer = VideoWriter(path, size, Fraction(25))
        for picture, time in zip(pictures(6, size), UNEVEN, strict=True):
            writer.write(picture, time)
        writer.finish()
        found, times = read_video(path)
        assert times == pytest.approx(UNEVEN, abs=1e-4)
        assert found[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
        if min(size) > 40:
            assert np.abs(found[3][: size[0], : size[1]].astype(int) - pictures(6, size)[3]).mean() < 4
        with av.open(str(path)) as file:
            context = file.streams.video[0].codec_context
            assert context.name == "h264" and context.pix_fmt == "yuv420p" and context.colorspace == 1

    def test_times_that_stand_still_and_another_size(self, tmp_path):
        writer = VideoWriter(tmp_path / "a.mp4", SIZE, Fraction(25), Fraction(2))
        for picture, time in zip([*pictures(2), *pictures(2, (96, 80))], (0.0, 0.5, 0.5, 0.4), strict=True):
            writer.write(picture, time)
        writer.finish()
        found, times = read_video(tmp_path / "a.mp4")
        assert len(found) == 4 and (np.diff(times) > 0).all() and found[3].shape == (*SIZE, 3)
        with av.open(str(tmp_path / "a.mp4")) as file:
            assert file.streams.video[0].sample_aspect_ratio == 2


class TestPredict:
    def test_what_is_written(self, tmp_path):
        path, steps = write_video(tmp_path / "a.mp4", turned=90), []
        summary, rows = segmented(path, tmp_path / "out", on_frame=lambda: steps.append(1))
        found, times = read_video(tmp_path / "out" / "clip_overlay.mp4")
        assert len(found) == len(rows) == summary.frames == len(steps) == len(UNEVEN)
        assert times == pytest.approx(UNEVEN, abs=2e-3) and found[0].shape == (*SIZE[::-1], 3)
        assert [float(row["time_s"]) for row in rows] == pytest.approx(UNEVEN, abs=2e-3)
        for row in rows:
            assert 0 < float(row["share"]) <= 1 and 0 < float(row["ms"]) <= float(row["frame_ms"])
            assert row["requested_share"] == row["exit"] == row["late"] == "", "nothing was asked, there are no exits"
        costs = [float(row["cost_gmacs"]) for row in rows]
        assert summary.cost_gmacs == pytest.approx((np.mean(costs), min(costs), max(costs)), rel=1e-4)
        assert json.loads((tmp_path / "out" / "clip_summary.json").read_text())["size"] == list(SIZE[::-1])
        assert summary.table().startswith("video ") and "late" not in summary.table()
        files = {file.name for file in (tmp_path / "out").iterdir()}
        assert files == {f"clip_{rest}" for rest in ("overlay.mp4", "overlay.png", "frames.csv", "summary.json")}

    def test_odd_and_tiny(self, tmp_path):
        path = write_video(tmp_path / "a.avi", [0.0, 0.04], size=(9, 21), codec="mpeg4")
        segmented(path, tmp_path / "out")
        found, _ = read_video(tmp_path / "out" / "clip_overlay.mp4")
        assert len(found) == 2 and found[0].shape == (10, 22, 3)

    @pytest.mark.parametrize(("frame_ms", "exits", "late"), [(1e9, {"2"}, {"0"}), (1e-9, {"0"}, {"1"})])
    def test_pace(self, tmp_path, frame_ms, exits, late):
        """With all the time of the world frames go as far as they can, with none no further than they must."""
        path, model = write_video(tmp_path / "a.mp4"), network(**EXITS)
        summary, rows = segmented(path, tmp_path / "out", model, frame_ms)
        assert {row["exit"] for row in rows[2:]} == exits and {row["late"] for row in rows} == late
        assert [row["exit"] for row in rows[:2]] == ["0", "0"], "nothing is known of whole frames yet"
        shares = {row["exit"]: float(row["share"]) for row in rows}
        assert all(float(row["requested_share"]) == pytest.approx(shares[row["exit"]], rel=1e-4) for row in rows)
        assert summary.asked_ms == frame_ms and summary.late == float(next(iter(late)))
        assert "% of the frames were late" in summary.table()

    def test_a_frame_leaves_where_it_is_told(self, tmp_path):
        model = network(**EXITS)
        steered = Steered(model, model)
        image, costs = noise(*SIZE), steered.costs(SIZE)
        runner = TorchNetwork(steered, model)
        for exit, route in enumerate(model.config.exit_routes):
            steered.level = exit
            assert np.array_equal(runner(image).gates > 0, route.to_gates() > 0)
        assert (np.diff(costs) > 0).all() and costs[-1] == 1
        with pytest.raises(ValueError, match="this network takes no budget: it has no exits"):
            Steered(network(depth=3), network(depth=3))

    def test_the_exit_of_frames_that_decide_themselves(self, tmp_path):
        _, rows = segmented(write_video(tmp_path / "a.mp4"), tmp_path / "out", network(**EXITS), most=2)
        assert [row["exit"] for row in rows] == ["2", "2"] and rows[0]["requested_share"] == ""

    def test_how_far_places_went(self, tmp_path):
        path, model = write_video(tmp_path / "a.mp4", size=(64, 96)), network(**EXITS, place=32)
        pixels, own = next(iter(open_clip(path))).pixels, TorchNetwork(model, model)
        with torch.no_grad():
            features = model.exit_features(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
            price = float(model.exits.see(0, features).median())
        asked = TorchNetwork(partial(model, price=price), model)
        whole, found = (segment(runner, pixels, "a", "a") for runner in (own, asked))
        maps = np.ones((1, 1)), effort_of(asked.network, found)
        assert whole.exits is None and np.ptp(maps[1]) > 0, "places left at different exits"
        for runner, shares, place in ((own, maps[0], 96), (asked, maps[1], 32)):
            predict_video(runner, open_clip(path), tmp_path / "out", "clip", effort=True)
            with Image.open(tmp_path / "out" / "clip_overlay.png") as still:
                assert np.array_equal(np.asarray(still), figures.effort(pixels, shares, place))
        drawn = read_video(tmp_path / "out" / "clip_overlay.mp4")[0][0].astype(int)
        assert np.abs(drawn - figures.effort(pixels, maps[1], 32, legend=False)).mean() < 8
        with pytest.raises(ValueError, match="Train one with --model.place 32"):
            segmented(path, tmp_path / "none", effort=True)

    def test_pictures_false_and_most(self, tmp_path):
        path = write_video(tmp_path / "a.mp4")
        summary, rows = segmented(path, tmp_path / "out", pictures=False, most=3)
        assert summary.frames == len(rows) == 3
        assert {file.name for file in (tmp_path / "out").iterdir()} == {"clip_frames.csv", "clip_summary.json"}

    def test_interrupted(self, tmp_path):
        """A file leaves nothing behind; a live video ends by it."""

        def stop():
            raise KeyboardInterrupt

        path = write_video(tmp_path / "a.mp4")
        with pytest.raises(KeyboardInterrupt):
            segmented(path, tmp_path / "out", on_frame=stop)
        assert list((tmp_path / "out").iterdir()) == []
        model, clip = network(depth=3), Newest(VideoFile(path))
        summary = predict_video(TorchNetwork(model, model), clip, tmp_path / "out", "live", on_frame=stop)
        assert summary.frames == 1 and len(read_video(tmp_path / "out" / "live_overlay.mp4")[0]) == 1

    def test_a_result_is_not_written_over_the_video(self, tmp_path):
        (tmp_path / "out").mkdir()
        path = write_video(tmp_path / "out" / "clip_overlay.mp4")
        with pytest.raises(ValueError, match="is itself an input"):
            segmented(path, tmp_path / "out")
        assert len(read_video(path)[0]) == len(UNEVEN)

    def test_without_a_frame(self, tmp_path):
        path = write_video(tmp_path / "a.mp4")
        data = path.read_bytes()
        begin = data.index(b"mdat") + 4
        path.write_bytes(data[:begin] + bytes(len(data[begin : data.index(b"moov")])) + data[data.index(b"moov") :])
        with pytest.raises(UnreadableVideo, match="no frame of .* can be decoded"):
            segmented(path, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


class TestCommand:
    def test_videos(self, tmp_path, checkpoint, capsys):
        for name in ("a.mp4", "b.mov"):
            write_video(tmp_path / name)
        (tmp_path / "c.mp4").write_bytes(b"nothing")
        words = ["predict", checkpoint, *(tmp_path / name for name in ("a.mp4", "b.mov", "c.mp4"))]
        code, out, err = run([*words, "--output", tmp_path / "out", "--frames", "2", "--fps", "0.001"], capsys)
        assert code == 2 and out.count("asked") == 2 and "skipped: cannot read" in out and not err
        for name in ("a", "b"):
            assert len(read_video(tmp_path / "out" / f"{name}_overlay.mp4")[0]) == 2

    def test_a_codec_that_nobody_knows(self, tmp_path, checkpoint, capsys):
        paths = [write_video(tmp_path / name) for name in ("a.mp4", "b.mp4")]
        strange = paths[0].read_bytes()
        assert strange.count(b"avc1") == 2  # among the brands of the file, and of the stream
        paths[0].write_bytes(b"zzzz".join(strange.rsplit(b"avc1", 1)))
        code, out, err = run(["predict", checkpoint, *paths, "--output", tmp_path / "out"], capsys)
        reason = f"cannot read {paths[0]}: it is coded in a way that FFmpeg does not know"
        assert code == 2 and f"skipped: {reason}" in out and not err
        assert (tmp_path / "out" / "b_overlay.mp4").exists() and not (tmp_path / "out" / "a_overlay.mp4").exists()
        code, _, err = run(["predict", checkpoint, paths[0], "--output", tmp_path / "out"], capsys)
        assert code == 2 and err == f"routeseg: error: {reason}\n"

    def test_a_budget(self, tmp_path, capsys):
        """As for images, a calibration is needed for it."""
        net = network(**EXITS).save(tmp_path / "net")
        words = ["predict", net, write_video(tmp_path / "a.mp4"), "--budget=50%", "--output", tmp_path / "out"]
        code, _, err = run(words, capsys)
        assert code == 2 and "the network was not calibrated" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["VIDEO", "IMAGE"], "is a video, IMAGE is none: predict them in commands of their own"),
            (["VIDEO", "--resume"], "--resume only applies to images, a video is segmented anew"),
            (["VIDEO", "--workers=2"], "--workers only applies to images"),
            (["VIDEO", "--fps=0"], "--fps is 0: give a number above 0"),
            (["VIDEO", "--frames=0"], "--frames is 0: give 1 or more"),
            (["VIDEO", "--fps=15", "--frame_ms=60"], "--fps and --frame_ms are given: choose one"),
            (["VIDEO", "--fps=15", "--budget=40%"], "--fps and --budget are given: choose one"),
            (["VIDEO", "--latency=60ms"], "means the table of a machine: give --frame_ms 60"),
            (["VIDEO", "--output=memory://out"], "results of videos go into a folder of this machine"),
            (["VIDEO", "--max_pixels=100"], "frames of 64x48, more than 100 pixels"),
            (["GATED", "VIDEO", "--fps=15"], "this network takes no budget: it has no exits"),
            (["IMAGE", "--fps=15"], "--fps only applies to videos: leave it out"),
            (["IMAGE", "--frames=15"], "--frames only applies to videos: leave it out"),
            (["IMAGE", "--effort"], "--effort only applies to videos: leave it out"),
            (["VIDEO", "--effort"], "--effort draws how far places go at a budget: give --budget"),
            (["VIDEO", "--effort", "--budget=40%", "--pictures=false"], "and no --pictures false"),
            (["IMAGE", "--source=0"], "--source is 0: leave out IMAGE, or --source"),
            (["nowhere.mp4"], "no file or folder nowhere.mp4"),
            (["--source=nowhere"], "no file or folder nowhere"),
            ([], "no inputs: name image files"),
        ],
    )
    def test_mistakes(self, tmp_path, capsys, words, message):
        places = {
            "VIDEO": write_video(tmp_path / "a.mp4"),
            "IMAGE": save(tmp_path / "b.png", noise(*SIZE)),
            "GATED": tmp_path / "net",
        }
        if "GATED" in words:
            network(depth=3).save(tmp_path / "net")
        output = [] if any("--output" in word for word in words) else ["--output", tmp_path / "out"]
        code, _, err = run(["predict", *(places.get(word, word) for word in words), *output], capsys)
        assert code == 2 and message.replace("IMAGE", str(places["IMAGE"])) in err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_without_pyav(self, tmp_path, checkpoint, monkeypatch, capsys):
        path = write_video(tmp_path / "a.mp4")
        monkeypatch.setitem(sys.modules, "av", None)
        code, _, err = run(["predict", checkpoint, path, "--output", tmp_path / "out"], capsys)
        assert code == 2 and "a video needs the package av" in err and "[video]" in err
