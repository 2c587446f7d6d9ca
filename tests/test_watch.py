"""What one sees of a training while it runs: a line for each validation, and progress.png."""

import re

import numpy as np
from PIL import Image

from conftest import run
from routeseg import DynamicRoutingNetwork, figures
from routeseg.data.config import DataConfig, open_data
from routeseg.evaluation import Evaluation
from routeseg.training import watch
from routeseg.training.callbacks import Progress
from routeseg.training.watch import ROWS, Row, Watch, thinned

NETWORK = ["--model.depth=3", "--model.base_channels=4", "--model.stem_channels=4"]
DATA = ["--data.image_size=[48,64]", "--data.crop=[32,64]", "--data.train_images=4", "--data.val_images=3"]
RECIPE = ["--recipe.validate_every=2", "--recipe.precise_bn_batches=1", "--recipe.precision=32-true"]
LINE = re.compile(
    r"^step (\d+) of 4: mIoU [\d.]+ %, cost [\d.]+ % of full, loss \d+\.\d{3}; "
    r"(the best|best [\d.]+ % at step 2)(; [\d.]+ minutes left)?$",
    re.MULTILINE,
)


def evaluation(miou: float) -> Evaluation:
    """Of two classes that are right in this share of the pixels of their union."""
    hits = round(1000 * miou)
    wrong = (1000 - hits) // 2
    confusion = np.array([[hits, wrong], [1000 - hits - wrong, hits]])
    return Evaluation(("a", "b"), confusion, np.ones(1), np.ones(1), np.ones((1, 4, 4, 3)))


def test_a_run_tells_of_each_validation_and_grows_a_picture(tmp_path, capsys):
    """A resumed run goes on with the rows that it had."""
    words = ["train", *NETWORK, *DATA, "--data.batch_size=2", "--data.workers=0", *RECIPE, "--accelerator=cpu"]
    words += ["--recipe.save_every=2", "--output", tmp_path]
    code, out, err = run([*words, "--recipe.iterations=2"], capsys)
    assert code == 0 and "step 2 of 2: mIoU" in out and "minutes left" not in out, err
    path = tmp_path / "progress.png"
    first = Image.open(path).size
    code, out, err = run([*words, "--recipe.iterations=4", "--resume"], capsys)
    assert code == 0, err
    (found,) = LINE.finditer(out)
    assert found[1] == "4" and found[3] is None
    row = Image.open(path).size[1] - first[1]
    assert Image.open(path).size[0] == first[0] and row > 40, "image, label, two validations"
    path.unlink()
    code, out, _ = run([*words, "--recipe.iterations=4", "--output", tmp_path / "whole"], capsys)
    steps = [(found[1], found[3] is not None) for found in LINE.finditer(out)]
    assert code == 0 and steps == [("2", True), ("4", False)]
    assert Image.open(tmp_path / "whole" / "progress.png").size == (first[0], first[1] + row)


def test_the_bar_of_a_resumed_run_counts_all_of_its_steps(tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(Progress, "_update", lambda self, bar, current, *_, **__: shown.append(current))
    words = ["train", *NETWORK, *DATA, "--data.batch_size=2", "--data.workers=0", *RECIPE, "--accelerator=cpu"]
    words += ["--recipe.save_every=2", "--output", tmp_path]
    assert run([*words, "--recipe.iterations=2"], capsys)[0] == 0 and shown == [1, 2]
    assert run([*words, "--recipe.iterations=5", "--resume"], capsys)[0] == 0 and shown[2:] == [3, 4, 5]


def test_few_rows_evenly_spread():
    rows: list[Row] = []
    for number in range(200):
        rows = thinned([*rows, Row(number, 10 * number, 0.5, {})])
        numbers = [row.number for row in rows]
        assert numbers[0] == 0 and numbers[-1] == number and len(rows) <= ROWS
        steps = np.diff(numbers[:-1])
        assert len(set(steps.tolist())) <= 1 and len(rows) > min(number, ROWS // 2)


def test_pictures_are_kept_small(tmp_path, monkeypatch):
    """Only what is drawn is kept, whatever the size of the images and their number."""
    drawn = []
    monkeypatch.setattr(figures, "progress_sheet", lambda path, rows: drawn.append(rows))
    pictures = open_data(DataConfig(image_size=(600, 1200), val_images=6), "val")
    model = DynamicRoutingNetwork(num_classes=len(pictures.classes), depth=3, base_channels=4, stem_channels=4)
    watching = Watch(pictures, 10_000, model.config, tmp_path / "progress.png")
    for step in range(1, 4):
        look = watching.begin(step)
        for index in range(6):
            look(pictures.name(index), np.zeros((600, 1200), np.uint8))
        watching.end(step, evaluation(step / 10))
    assert [words for words, _ in drawn[-1]] == [
        ["image"],
        ["label"],
        *([f"step {step}", f"mIoU {10 * step}.0 %"] for step in (1, 2, 3)),
    ]
    assert all(len(tiles) == watch.SHOWN and tiles[0].shape == (140, 280, 3) for _, tiles in drawn[-1])
    assert all(one.size == 140 * 280 for row in watching.rows for one in row.predictions.values())
    other = Watch(pictures, 10_000, model.config, tmp_path / "progress.png")
    other.load_state_dict(watching.state_dict())
    assert [row.step for row in other.rows] == [1, 2, 3]


def test_what_cannot_be_drawn_is_one_line(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    pictures = open_data(DataConfig(image_size=(48, 64), val_images=2), "val")
    model = DynamicRoutingNetwork(num_classes=len(pictures.classes), depth=3, base_channels=4, stem_channels=4)
    watching = Watch(pictures, 10, model.config, tmp_path / "file" / "progress.png")
    look = watching.begin(1)
    look(pictures.name(0), np.zeros((48, 64), np.uint8))  # the other image could not be read
    watching.end(1, evaluation(0.5))
    (line,) = caplog.messages
    assert line.startswith("no figure of the progress: ") and "\n" not in line
