"""Single kernels, as their benchmark calls them: each computes what PyTorch computes."""

import shutil
from argparse import Namespace

import pytest
import torch

import kernels
from routeseg.engine import compiled
from routeseg.engine.compiled import BUILDS, is_compiled

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
