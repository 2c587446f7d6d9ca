"""The notebooks in examples/ run from beginning to end."""

import json
from pathlib import Path

import pytest

from routeseg.prediction.image import SegmentedImage

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_images(tmp_path, monkeypatch, capsys):
    """With fewer steps and smaller images, and without drawing: its cells are run as they stand otherwise."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    quick = {
        "minutes=MINUTES": 'recipe={"iterations": 2, "precise_bn_batches": 1}',
        '"60", "--val", "20", "--size", "[128, 256]"': '"8", "--val", "8", "--size", "[64, 128]"',
        '"crop": [128, 256]': '"crop": [64, 128], "batch_size": 2, "workers": 0',
    }
    changed = []
    for cell in json.loads((EXAMPLES / "own_images.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            for place, words in quick.items():
                changed += [place] * (place in text)
                text = text.replace(place, words)
            exec(compile(text, "own_images.ipynb", "exec"), names)
    assert sorted(changed) == sorted(quick)
    out = capsys.readouterr().out
    assert "ready" in out and "mIoU on the validation images" in out and "asked 50%" in out
    result = names["result"]
    assert isinstance(result, SegmentedImage) and result._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_keep_no_outputs(path):
    """What a machine printed once would grow old unseen."""
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
