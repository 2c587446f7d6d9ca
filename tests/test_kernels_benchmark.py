"""The benchmark of single kernels: each computes what PyTorch computes, and the file has a row for each."""

import importlib
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from routeseg.engine import compiled
from routeseg.engine.compiled import BUILDS, is_compiled

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # its files import each other
try:
    kernels = importlib.import_module("kernels")
finally:
    sys.path.pop(0)

pytestmark = pytest.mark.skipif(
    not is_compiled(torch.float32) and shutil.which("c++") is None, reason="no kernels: there is no C++ compiler"
)
SMALL = Namespace(size=(64, 96), channels=32, scales=2, classes=5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", BUILDS)
@torch.inference_mode()
def test_every_kernel_computes_what_pytorch_computes(build, precision):
    if build not in kernels.runnable_builds():
        pytest.skip(f"this machine does not run the build {build}")
    library = compiled._load(build)
    if not hasattr(library, f"routeseg_forward_{precision}"):
        pytest.skip(f"the build {build} has no {precision}")
    names = []
    for case in kernels.cases(kernels.Kernels(library, precision, 2), SMALL):
        case.found.fill_(float("nan"))
        case.call()
        expected = case.expected()
        error = float((case.found.float() - expected).abs().max() / expected.abs().max())
        assert error < (1e-5 if precision == "float32" else 0.03), case.name
        assert (case.gmacs > 0) != (case.gbytes > 0)
        names.append(case.name)
    assert len(names) == len(set(names)) > 30


def test_a_kernel_that_fails_says_why():
    kept = kernels.Kernels(compiled.find_library(torch.float32), "float32", 2)
    with torch.no_grad():
        case = kept.convolution("7x7", kernels.separable(32, 32, 7), (16, 16))
    with pytest.raises(RuntimeError, match="failed in convolve_float32: a convolution's kernel is none of 1, 3 and 5"):
        case.call()


def test_the_file(tmp_path, capsys):
    output = tmp_path / "kernels.json"
    build = kernels.runnable_builds()[-1]
    words = "--size 64x96 --channels 32 --scales 1 --classes 5 --seconds 0 --product 32 --copy-bytes 4096".split()
    before = torch.get_num_threads()
    try:
        kernels.main([*words, "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(before)
    found = json.loads(output.read_text())
    assert found["build"] == build and found["machine"]["cpu"] and found["versions"]["torch"] and found["date"]
    precisions = {"float32"} | ({"bfloat16"} if build in ("avx512bf16", "amx") else set())
    assert set(found["products"]) == precisions == {row["precision"] for row in found["kernels"].values()}
    for name, row in found["kernels"].items():
        assert 0 < row["min_ms"] <= row["median_ms"], name
        bound = found["products"][row["precision"]] if "gmacs" in row else found["copy"]
        work = 2 * row["gmacs"] if "gmacs" in row else row["gbytes"]
        assert row["rate_of_bound"] == pytest.approx(1000 * work / row["min_ms"] / bound["rate"]), name
    assert capsys.readouterr().out.count("\n") == len(found["kernels"]) + 2


def test_channels_that_are_no_whole_vectors(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--channels", "7"])
    assert "--channels 7: it must be a multiple of" in capsys.readouterr().err
