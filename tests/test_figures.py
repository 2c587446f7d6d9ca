"""What the images and the report show, as a reader would notice it."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from routeseg import figures
from routeseg.data import scenes
from routeseg.data.sets import camvid
from routeseg.figures import charts, comparison, words
from routeseg.figures.labels import even_columns
from routeseg.figures.report import Report
from routeseg.labels import default_palette
from routeseg.model.checkpoints import PRETRAINED, read_config
from routeseg.space import DOWN, KEEP, UP, RoutingSpace

NAMES = ["sky", "road", "car", "person"]
PALETTE = np.array([[70, 130, 180], [128, 64, 128], [0, 0, 142], [220, 20, 60]], dtype=np.uint8)
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[height // 2 :] = 1
    labels[-height // 4 :, : width // 4] = 2
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, labels


def soft_gates(space: RoutingSpace, share_open: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(space.depth)
    gates = np.where(rng.random(space.legal.shape) < share_open, rng.random(space.legal.shape), 0)
    gates[0, 0] = 0, 0.9, 0.5
    return (gates * space.legal).astype(np.float32)


def read(path) -> np.ndarray:
    """An image file's pixels; for SVG, the width and height it names."""
    if path.suffix == ".png":
        pixels = cv2.imread(str(path))
        assert pixels is not None, f"{path} is no PNG"
        return pixels
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    return np.zeros([round(float(re.sub("[a-z]+", "", root.get(side)))) for side in ("height", "width")])


class TestColorize:
    def test_each_class_has_its_colour_and_ignored_pixels_are_black(self):
        labels = np.array([[0, 1], [3, 255]], dtype=np.uint8)
        colors = figures.colorize(labels, PALETTE)
        assert colors.dtype == np.uint8
        assert colors.tolist() == [[[70, 130, 180], [128, 64, 128]], [[220, 20, 60], [0, 0, 0]]]

    def test_a_class_without_a_colour_is_named(self):
        with pytest.raises(ValueError, match="label 4 has no colour"):
            figures.colorize(np.array([[4]], dtype=np.uint8), PALETTE)

    @pytest.mark.parametrize("labels", [np.zeros((2, 2)), np.zeros((1, 2, 2), dtype=np.uint8)])
    def test_what_is_no_label_map_is_refused(self, labels):
        with pytest.raises(ValueError, match="whole numbers"):
            figures.colorize(labels, PALETTE)


class TestOverlay:
    def test_the_legend_lists_the_classes_present_only(self):
        labels = np.array([[0, 0, 0, 255], [0, 0, 2, 2]], dtype=np.uint8)
        entries = figures.legend_entries(labels, NAMES, PALETTE)
        assert [(name, share) for name, _, share in entries] == [
            ("sky", 5 / 8),
            ("car", 2 / 8),
            ("ignored", 1 / 8),
        ]
        assert entries[1][1] == (0, 0, 142)

    @pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 333), (200, 40), (480, 640), (1024, 2048), (1, 1)])
    def test_picture_on_top_left_and_a_legend_in_the_class_colours(self, height, width):
        image, labels = picture(height, width)
        result = figures.overlay(image, labels, NAMES, PALETTE)
        factor = max(1, -(-figures.MIN_IMAGE // max(height, width)))
        assert result.dtype == np.uint8 and max(result.shape) >= figures.MIN_IMAGE
        below = result[height * factor :].reshape(-1, 3)
        beside = result[:, width * factor :].reshape(-1, 3)
        strip = np.concatenate([below, beside])
        for index, color in enumerate(PALETTE):
            assert (strip == color).all(1).any() == (index in labels), f"{NAMES[index]} in the legend"

    def test_small_pictures_are_enlarged_large_ones_are_not(self):
        small = figures.overlay(*picture(64, 64), NAMES, PALETTE)
        assert small.shape[1] == 512
        large = figures.overlay(*picture(512, 1024), NAMES, PALETTE)
        assert large.shape[1] == 1024

    def test_alpha_goes_from_the_image_to_the_label_map(self):
        image, labels = np.full((32, 32, 3), 200, dtype=np.uint8), np.zeros((32, 32), dtype=np.uint8)
        plain = figures.overlay(image, labels, NAMES, PALETTE, alpha=0, legend=False)
        full = figures.overlay(image, labels, NAMES, PALETTE, alpha=1, legend=False)
        assert np.array_equal(plain, image) and np.array_equal(full, figures.colorize(labels, PALETTE))

    def test_borders_between_classes_stand_out(self):
        labels = np.zeros((32, 32), dtype=np.uint8)
        labels[:, 16:] = 1
        result = figures.overlay(np.zeros((32, 32, 3), np.uint8), labels, NAMES, PALETTE, legend=False)
        brightness = result.astype(int).sum(-1)
        assert (brightness[:, 15:17].max(1) > brightness[:, [4, 28]].max(1)).all()

    def test_long_names_do_not_widen_the_picture(self):
        image, labels = picture(300, 600)
        names = ["a very long class name " * 10, *NAMES[1:]]
        assert figures.overlay(image, labels, names, PALETTE).shape[1] == 600

    def test_mismatches_say_what_to_do(self):
        image, labels = picture(32, 32)
        with pytest.raises(ValueError, match="same size"):
            figures.overlay(image, labels[:16], NAMES, PALETTE)
        with pytest.raises(ValueError, match="3 class names, 4 colours"):
            figures.overlay(image, labels, NAMES[:3], PALETTE)
        with pytest.raises(ValueError, match="uint8"):
            figures.overlay(image / 255, labels, NAMES, PALETTE)

    @pytest.mark.parametrize("name", ["background", "Background", "BACKGROUND "])
    def test_pictures_show_through_a_background_without_a_colour_of_its_own(self, name):
        """They were red all over, as most of an image is background."""
        image, labels = picture(64, 64)
        names = [name, *NAMES[1:]]
        for palette in (default_palette(names), [(0, 0, 0), *PALETTE[1:]]):
            result = figures.overlay(image, labels, names, palette, legend=False)
            assert np.array_equal(result[labels == 0], image[labels == 0])
            assert not np.array_equal(result[labels == 1], image[labels == 1])
        chosen = figures.overlay(image, labels, names, PALETTE, legend=False)
        assert not np.array_equal(chosen[labels == 0], image[labels == 0])

    def test_the_columns_of_a_legend_are_even(self):
        for count in range(1, 30):
            for columns in range(1, 6):
                places = even_columns(count, columns)
                lengths = [sum(column == k for column, _ in places) for k in range(columns)]
                assert len(set(places)) == count and max(lengths) - min(lengths) <= 1
                assert max(row for _, row in places) == -(-count // columns) - 1


class TestPalette:
    def test_the_first_colour_is_not_red_and_a_background_is_grey(self):
        for names in (["road", "rest"], ["Background", "tumour"]):
            for red, green, blue in default_palette(names):
                assert red <= max(green, blue)
        assert default_palette(["Background", "tumour"])[0] == (128, 128, 128)

    def test_none_is_so_dark_that_an_image_hides_it(self):
        weights = np.array([0.299, 0.587, 0.114])
        for palette in (camvid.CLASSES.palette, scenes.PALETTE, default_palette([f"class {k}" for k in range(100)])):
            assert (np.array(palette) @ weights).min() > 60
        assert read_config(PRETRAINED).palette == camvid.CLASSES.palette

    def test_neighbours_are_of_different_families_and_none_comes_again(self):
        colours = np.array(default_palette([f"class {k}" for k in range(255)]), dtype=np.uint8)
        assert len(np.unique(colours, axis=0)) == 255
        hues = cv2.cvtColor(colours[None], cv2.COLOR_RGB2HSV)[0, :, 0].astype(int) * 2  # degrees
        apart = np.abs(np.diff(hues))
        assert np.minimum(apart, 360 - apart).min() > 50
        few = cv2.cvtColor(colours[None, :24].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
        distances = np.linalg.norm(few[:, None] - few, axis=-1) + 1000 * np.eye(24)
        assert distances.min() > 10, "just told apart: 2"


STRANGE = "\u56fe\u50cf 7"  # Chinese


class TestWords:
    def test_long_names_that_differ_at_an_end_stay_different(self):
        names = ["a" * 60 + "1", "a" * 60 + "2", "3" + "a" * 60]
        cut = [words.fitted(name, 14, 200)[0] for name in names]
        assert len(set(cut)) == 3 and all(words.text_font(14).getlength(one) <= 200 for one in cut)
        assert words.fitted("short", 14, 200)[0] == "short" and words.fitted("abc", 14, 1)[0] == words.DOTS

    @pytest.fixture(params=[True, False], ids=["a font has them", "no font has them"])
    def has_font(self, request, monkeypatch, tmp_path):
        """A font that is said to have these letters: the usual one, whose boxes are no matter here."""
        path = tmp_path / "font.ttf"
        path.write_bytes(words._usual_font().read_bytes())
        known = words.letters_of(words._usual_font())
        letters = words.letters_of.__wrapped__
        monkeypatch.setattr(words, "installed_fonts", lambda: (path,) if request.param else ())
        more = known | {ord(letter) for letter in STRANGE}
        monkeypatch.setattr(words, "letters_of", lambda font: more if font == path else letters(font))
        return path if request.param else None

    def test_any_letters(self, has_font):
        assert words.drawable(STRANGE) == (STRANGE if has_font else "\\u56fe\\u50cf 7", has_font)
        assert words.drawable("fe\u0301e \u00e4") == ("f\u00e9e \u00e4", None), "letters and accents, as macOS has them"
        assert words.drawable("a\udcff.png") == ("a\\udcff.png", None), "a file name that is no UTF-8"

    def test_figures_say_it_without_a_warning(self, tmp_path, has_font, monkeypatch, recwarn):
        drawn = []
        save = Figure.savefig

        def listen(figure, *args, **how):
            save(figure, *args, **how)
            drawn.extend((text.get_text(), text.get_fontproperties().get_file()) for text in figure.findobj(Text))

        monkeypatch.setattr(Figure, "savefig", listen)
        names = [STRANGE, "road"]
        figures.class_iou_bars(tmp_path / "iou.png", names, [0.5, 0.7], PALETTE[:2])
        figures.confusion_matrix(tmp_path / "confusion.png", names, np.eye(2))
        figures.save_route(tmp_path / "route.png", RoutingSpace(3), soft_gates(RoutingSpace(3)), STRANGE)
        image, labels = picture(64, 64)
        figures.overlay(image, labels % 2, names, PALETTE[:2])
        section = figures.Section("a", [(STRANGE, image, labels % 2)])
        figures.contact_sheet(tmp_path / "sheet.png", STRANGE, [section], names, PALETTE[:2], [1, 0])
        said = words.drawable(STRANGE)
        assert [text for text, _ in drawn].count(said[0]) >= 4, "one class twice in a matrix"
        assert {font for text, font in drawn if text == said[0]} == {str(has_font) if has_font else None}
        if has_font is None:
            assert not [warning for warning in recwarn if "lyph" in str(warning.message)]


class Drawn:
    """A route drawn on a canvas whose pixels can be asked for."""

    def __init__(self, space: RoutingSpace, gates: np.ndarray, stages: int = 0) -> None:
        figure = Figure(figsize=(0.6 * (space.depth + 3), 3), dpi=120)
        canvas = FigureCanvasAgg(figure)
        self.ax = figure.add_axes((0, 0, 1, 1))
        figures.draw_route(self.ax, space, gates, legend=False, stages=stages)
        canvas.draw()
        self.grey = cv2.cvtColor(np.asarray(canvas.buffer_rgba())[..., :3], cv2.COLOR_RGB2GRAY)

    def at(self, layer: float, scale: float, radius: int = 6) -> np.ndarray:
        x, y = self.ax.transData.transform((layer, scale))
        row, column = self.grey.shape[0] - round(y), round(x)
        return self.grey[row - radius : row + radius + 1, column - radius : column + radius + 1]

    def edge(self, layer: int, scale: int, direction: int) -> np.ndarray:
        """Around a point of the edge that no other edge crosses."""
        return self.at(layer + 0.3, scale + 0.3 * {UP: -1, KEEP: 0, DOWN: 1}[direction])


class TestRoute:
    space = RoutingSpace(4)

    def gates(self, *edges: tuple[int, int, int], strength: float = 0.9) -> np.ndarray:
        gates = np.zeros(self.space.legal.shape, dtype=np.float32)
        for edge in edges:
            gates[edge] = strength
        return gates

    @pytest.mark.parametrize("direction", [UP, KEEP, DOWN])
    @pytest.mark.parametrize("strength", [0.02, 0.5, 1.0])
    def test_an_open_path_is_darker_and_wider_than_a_closed_one_in_greyscale(self, direction, strength):
        way = [(0, 0, DOWN), (1, 1, KEEP)]
        opened = Drawn(self.space, self.gates(*way, (2, 1, direction), strength=strength)).edge(2, 1, direction)
        other = KEEP if direction != KEEP else UP
        closed = Drawn(self.space, self.gates(*way, (2, 1, other))).edge(2, 1, direction)
        assert closed.min() < 250, "closed paths are there, faintly"
        assert int(opened.min()) < int(closed.min()) - 50
        assert (opened < 200).sum() > (closed < 200).sum()

    def test_strength_shows_in_tone_and_width(self):
        inks = [Drawn(self.space, self.gates((0, 0, KEEP), strength=s)).edge(0, 0, KEEP) for s in (0.1, 0.5, 1.0)]
        tones, widths = [int(i.min()) for i in inks], [int((i < 200).sum()) for i in inks]
        assert tones == sorted(tones, reverse=True) and widths == sorted(widths) and len(set(widths)) == 3

    @pytest.mark.parametrize(("depth", "name"), [(4, "a" * 255), (9, "word " * 30), (16, "\u8f66" * 64)], ids="abc")
    def test_long_names_stay_clear_of_the_pictures(self, tmp_path, monkeypatch, depth, name):
        drawn, space = [], RoutingSpace(depth)
        for module in ("routes", "route_statistics"):
            monkeypatch.setattr(f"routeseg.figures.{module}.save_figure", lambda figure, *_: drawn.append(figure))
        image, gates = picture(40, 60)[0], np.zeros(space.legal.shape)
        figures.routes_side_by_side(tmp_path / "a.png", space, [([image] * 2, gates, f"{name}\n12 %, 0.5 GMACs")] * 2)
        panel = (image, image, gates, f"{name}: 0.123 GMACs, 40 % of full")
        figures.extreme_routes(tmp_path / "b.png", space, {"cheapest": [panel] * 2, "dearest": [panel]})
        for figure in drawn:
            figure.canvas.draw()
            shown = [ax.get_window_extent() for ax in figure.axes if ax.images]
            titles = [ax.title.get_window_extent() for ax in figure.axes if ax.title.get_text()]
            assert titles and not any(
                one.overlaps(other) for one in titles for other in [*shown, *titles] if one is not other
            )

    def test_cells_that_run_are_filled_dropped_ones_hollow_others_faint(self):
        drawn = Drawn(self.space, self.gates((0, 0, DOWN)))
        runs, dropped, nothing = drawn.at(0, 0, 2), drawn.at(1, 1, 2), drawn.at(2, 2, 6)
        assert runs.max() < 90 and dropped.min() > 240
        assert drawn.at(1, 1, 9).min() < 90, "the hollow circle has a rim"
        assert nothing.min() > 150

    def test_a_free_skip_is_dotted(self):
        drawn = Drawn(self.space, self.gates((0, 0, DOWN)))
        x0, y0 = drawn.ax.transData.transform((1.2, 1))
        x1, _ = drawn.ax.transData.transform((1.8, 1))
        line = drawn.grey[drawn.grey.shape[0] - round(y0) - 1, round(x0) : round(x1)]
        assert (np.diff((line < 190).astype(int)) == 1).sum() >= 4

    def test_open_gates_of_a_node_that_nothing_reaches_are_not_drawn_open(self):
        drawn = Drawn(self.space, self.gates((3, 3, UP)))
        assert drawn.edge(3, 3, UP).min() > 180

    def test_a_stage_of_a_backbone_is_a_square_on_its_path_filled_if_it_runs(self):
        gates = self.gates((0, 0, DOWN), (1, 1, KEEP))
        drawn, plain = Drawn(self.space, gates, stages=3), Drawn(self.space, gates)
        runs, closed = drawn.at(0.5, 0.5, 4), drawn.at(1.5, 1.5, 3)
        assert 100 < runs.min() and runs.max() < 150, "filled, neither path nor paper"
        assert closed.min() > 240, "hollow"
        assert (drawn.at(-0.5, 0, 4) == runs).all(), "the first stage always runs"
        assert (drawn.at(2.5, 2.5) == plain.at(2.5, 2.5)).all(), "there is no fourth"

    @pytest.mark.parametrize("depth", [3, 4, 16, 33])
    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_files_of_every_depth(self, tmp_path, depth, suffix):
        space = RoutingSpace(depth)
        path = tmp_path / "made" / f"route{suffix}"
        figures.save_route(path, space, soft_gates(space), "frankfurt_000000.png · 45 GMACs & $5")
        height, width = read(path).shape[:2]
        assert 200 <= height <= 900 and 250 <= width <= 2800
        assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing temporary is left"

    def test_all_closed_and_all_open(self, tmp_path):
        inks = []
        for gates in (np.zeros(self.space.legal.shape), np.ones(self.space.legal.shape)):
            figures.save_route(tmp_path / "route.png", self.space, gates)
            inks.append((read(tmp_path / "route.png") < 128).mean())
        assert inks[1] > 2 * inks[0] > 0

    def test_bad_gates_and_suffixes_are_refused_and_write_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="one image's"):
            figures.save_route(tmp_path / "a.png", self.space, np.zeros((2, 5, 4, 3)))
        with pytest.raises(ValueError, match="NaN"):
            figures.save_route(tmp_path / "a.png", self.space, np.full(self.space.legal.shape, np.nan))
        with pytest.raises(ValueError, match=".png or .svg"):
            figures.save_route(tmp_path / "a.jpg", self.space, self.gates())
        assert not list(tmp_path.iterdir())

    def test_the_same_route_gives_the_same_png(self, tmp_path):
        for name in ("a.png", "b.png"):
            figures.save_route(tmp_path / name, self.space, soft_gates(self.space), "same")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    @pytest.mark.parametrize("sizes", [[(64, 128)], [(64, 128), (100, 75), (300, 90)]])
    def test_side_by_side_grows_with_the_panels(self, tmp_path, sizes):
        panels = []
        for height, width in sizes:
            image, labels = picture(height, width)
            tint = figures.overlay(image, labels, NAMES, PALETTE)
            panels.append(([image, tint], soft_gates(self.space), "large scale: 0.31 GMACs (42 % of full)"))
        figures.routes_side_by_side(tmp_path / "side.png", self.space, panels)
        side = read(tmp_path / "side.png")
        assert side.shape[1] > 450 * len(panels)
        more = [([*pictures, pictures[0]], gates, title) for pictures, gates, title in panels]
        figures.routes_side_by_side(tmp_path / "more.png", self.space, more, row_names=("image", "label", "prediction"))
        assert read(tmp_path / "more.png").shape[0] > side.shape[0] + 100

    def test_side_by_side_needs_a_panel(self, tmp_path):
        with pytest.raises(ValueError, match="at least one"):
            figures.routes_side_by_side(tmp_path / "side.png", self.space, [])


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """The texts of the figures written in a test."""
    found: list[str] = []
    save = charts.save_figure

    def listen(figure, path, kind):
        found.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, path, kind)

    monkeypatch.setattr(charts, "save_figure", listen)
    return found


class TestCharts:
    def test_a_whole_run(self, tmp_path, texts):
        rows = [{"step": s, "loss": 2 / (1 + s), "cross_entropy": 1.9 / (1 + s), "budget_loss": 0.1} for s in range(90)]
        rows += [{"step": s, "expected_cost": 0.5, "real_cost": 0.6, "lr": 0.05} for s in range(90)]
        rows += [{"step": 40, "val_miou": 0.5}, {"step": 80, "val_miou": 0.625, "loss": float("nan")}]
        figures.learning_curves(tmp_path / "run.svg", rows, budget_start_step=36, budget_target=0.1)
        read(tmp_path / "run.svg")
        wanted = ("cross-entropy", "budget loss", "best 62.5 % at step 80", "budget starts", "target 10 %")
        assert set(wanted) <= set(texts)

    def test_what_a_run_lacks_is_left_out(self, tmp_path, texts):
        rows = [{"step": "1", "loss": "2.5", "val_miou": ""}, {"step": 2, "loss": 2.0, "lr": None}]
        figures.learning_curves(tmp_path / "run.png", rows)
        read(tmp_path / "run.png")
        assert "loss" in texts and not any("mIoU" in t or "cost" in t or "rate" in t for t in texts)

    def test_a_run_without_metrics_or_steps_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="nothing to draw"):
            figures.learning_curves(tmp_path / "run.png", [{"step": 1, "loss": float("nan")}])
        with pytest.raises(ValueError, match="row 0 has no step"):
            figures.learning_curves(tmp_path / "run.png", [{"loss": 1.0}])

    def test_smoothing_keeps_a_constant_and_the_length(self):
        assert np.allclose(charts._smooth(np.full(200, 3.0)), 3) and len(charts._smooth(np.ones(31))) == 31

    def test_class_bars_say_every_value_and_absent(self, tmp_path, texts):
        figures.class_iou_bars(tmp_path / "iou.png", NAMES, [0.95, 0.5, float("nan"), 0.05], PALETTE)
        read(tmp_path / "iou.png")
        assert {"95.0", "50.0", "absent", "5.0", "mIoU 50.0", *NAMES} <= set(texts)

    def test_class_bars_with_every_class_absent_and_with_a_missing_value(self, tmp_path, texts):
        figures.class_iou_bars(tmp_path / "iou.png", NAMES, [float("nan")] * 4, PALETTE)
        assert texts.count("absent") == 4
        with pytest.raises(ValueError, match="4 names, 3 IoU values"):
            figures.class_iou_bars(tmp_path / "iou.png", NAMES, [0.5] * 3, PALETTE)

    @pytest.mark.parametrize("classes", [2, 19, 150])
    def test_confusion_matrix(self, tmp_path, texts, classes):
        """Rows add up to 100 %; a class that never occurs says so."""
        names = [f"class number {k}" for k in range(classes)]
        confusion = np.random.default_rng(0).integers(0, 50, (classes, classes))
        confusion += np.diag(confusion.sum(1))  # half of each row is right
        if classes > 2:
            confusion[1] = 0
        figures.confusion_matrix(tmp_path / "confusion.png", names, confusion)
        pixels = read(tmp_path / "confusion.png")
        assert max(pixels.shape) < 5000 and min(pixels.shape[:2]) > 300
        assert set(names) <= set(texts)
        assert any(text.isdigit() for text in texts) == (classes < 150), "there is no room for them"
        assert texts.count("never occurs") == (classes > 2)

    def test_confusion_matrix_wants_one_name_per_class(self, tmp_path):
        with pytest.raises(ValueError, match=r"4 names, a matrix of \[3, 3\]"):
            figures.confusion_matrix(tmp_path / "confusion.png", NAMES, np.eye(3))

    @pytest.mark.parametrize("cost", [[44.9] * 3, [30.0], np.linspace(40, 50, 99), [119.65, 130.0]])
    def test_cost_histogram(self, tmp_path, texts, cost):
        figures.cost_histogram(tmp_path / "cost.png", cost, 119.65)
        read(tmp_path / "cost.png")
        assert any(t.startswith(f"mean {np.mean(cost):.3g} GMACs") for t in texts)

    def test_costs_of_several_sizes_are_shares_of_what_each_image_costs_at_most(self, tmp_path, texts, monkeypatch):
        """Two images, of which the large one costs five times as much and has the smaller share."""
        drawn = []
        monkeypatch.setattr("routeseg.figures.charts.save_figure", lambda figure, *_: drawn.append(figure))
        figures.cost_histogram(tmp_path / "cost.png", [1.0, 5.0], [2.0, 20.0])
        axis = drawn[0].axes[0]
        bars = [bar for bar in axis.patches if bar.get_height()]
        assert bars[0].get_x() == 25 and bars[-1].get_x() + bars[-1].get_width() == 50
        said = [text.get_text() for text in axis.texts]
        assert said == ["mean 3 GMACs, 38 % of full"] and axis.get_xlim()[1] < 60 and not axis.child_axes
        assert [label.get_text() for label in drawn[0].axes[1].get_xticklabels()][2] == "full: 2 to 20 GMACs"

    def test_cost_histogram_refuses_what_is_no_cost(self, tmp_path):
        for cost, full in (([], 1), ([float("nan")], 1), ([1], 0)):
            with pytest.raises(ValueError):
                figures.cost_histogram(tmp_path / "cost.png", cost, full)
        assert not list(tmp_path.iterdir())


class Page(HTMLParser):
    """The tags of a page and whether each is closed in turn."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestReport:
    def page(self, tmp_path) -> tuple[Page, str]:
        hostile = '<script>alert("x")</script> & <img src=http://example.com>'
        (tmp_path / "one.png").write_bytes(PIXEL)
        space = RoutingSpace(3)
        figures.save_route(tmp_path / "route.svg", space, soft_gates(space))
        report = Report(hostile, hostile)
        report.heading(hostile)
        report.paragraph(f"{hostile}\n\nsecond")
        report.table(["network", "mIoU", hostile], [["U-Net", 71.6, 6100000], [hostile, None, 17785000]])
        report.figure(tmp_path / "one.png", hostile)
        report.figure(PIXEL, "bytes")
        report.gallery([(tmp_path / "one.png", "left"), (str(tmp_path / "route.svg"), "right")])
        report.code(f"routeseg fit\n{hostile}")
        report.legend([(hostile, (255, 0, 16))])
        report.key_numbers([("72.8 %", hostile)])
        report.write(tmp_path / "out" / "report.html")
        text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
        return Page(text), text

    def test_text_stays_text(self, tmp_path):
        page, text = self.page(tmp_path)
        assert "script" not in {tag for tag, _ in page.tags}
        assert sum('<script>alert("x")</script>' in part for part in page.text) >= 8
        assert "#ff0010" in text
        assert len([tag for tag, _ in page.tags if tag == "img"]) == 4

    def test_nothing_comes_from_outside(self, tmp_path):
        page, text = self.page(tmp_path)
        for tag, attributes in page.tags:
            assert tag not in ("script", "link", "iframe", "object")
            assert "src" not in attributes or attributes["src"].startswith("data:image/")
            assert "href" not in attributes and not any(name.startswith("on") for name in attributes)
        assert "url(" not in text and "@import" not in text

    def test_pictures_are_inside(self, tmp_path):
        page, _ = self.page(tmp_path)
        sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
        assert base64.b64decode(sources[0].split(",")[1]) == PIXEL
        assert sources[3].startswith("data:image/svg+xml;base64,")

    def test_numbers_stand_on_the_right(self, tmp_path):
        page, _ = self.page(tmp_path)
        sides = [attributes.get("class") for tag, attributes in page.tags if tag in ("th", "td")]
        assert sides == [None, "n", "n"] * 3
        assert "17,785,000" in page.text and "–" in page.text

    def test_key_numbers_come_first(self, tmp_path):
        _, text = self.page(tmp_path)
        assert text.index("72.8 %") < text.index("<h2>")

    def test_mistakes_name_the_remedy(self, tmp_path):
        report = Report("title")
        with pytest.raises(ValueError, match="missing.png"):
            report.figure(tmp_path / "missing.png", "")
        with pytest.raises(ValueError, match="PNG, JPEG or SVG"):
            report.figure(b"GIF89a", "")
        with pytest.raises(ValueError, match="row 0 has 1 cells, the header 2"):
            report.table(["a", "b"], [[1]])


def row(label, kind, miou, cost, spread=0.0, std=0.004):
    gmacs = {"mean": cost, "min": cost - spread, "max": cost + spread}
    return {"label": label, "kind": kind, "miou_mean": miou, "miou_std": std, "gmacs": gmacs}


def test_labels_of_the_figure_do_not_overlap(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comparison, "_label_points", lambda *args, place=comparison._label_points: seen.extend(place(*args))
    )
    rows = [row(f"Dynamic-{k}", "dynamic", 0.70 + 0.002 * k, 50 + k, 2.0) for k in range(6)]
    rows += [row("U-Net", "static", 0.70, 50), row("Fixed", "fixed", 0.701, 50.2, std=None)]
    figures.accuracy_cost(tmp_path / "a.png", rows)
    assert len(seen) == len(rows)
    assert not any(comparison._overlap(a, b) > 1 for i, a in enumerate(seen) for b in seen[:i])
    with pytest.raises(ValueError, match="kind"):
        figures.accuracy_cost(tmp_path / "b.png", [row("U-Net", "other", 0.7, 50)])
    with pytest.raises(ValueError, match="no network"):
        figures.accuracy_cost(tmp_path / "b.png", [])
