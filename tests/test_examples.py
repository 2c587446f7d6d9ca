"""The notebooks in examples/ run from beginning to end."""

import json
from pathlib import Path

import pytest

from routeseg.prediction.image import SegmentedImage

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_images(tmp_path, monkeypatch, capsys, one_thread):
    """With fewer steps, and without drawing: its cells are run as they stand otherwise."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads((EXAMPLES / "own_images.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            text = text.replace("minutes=MINUTES", 'recipe={"iterations": 2, "precise_bn_batches": 1}')
            exec(compile(text, "own_images.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert "ready" in out and "mIoU on the validation images" in out and "asked 50%" in out
    result = names["result"]
    assert isinstance(result, SegmentedImage) and result._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_keep_no_outputs(path):
    """What a machine printed once would grow old unseen."""
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
