"""The kernels of the CPU engine, once for each instruction set; without a C++ compiler the package does without."""

import sysconfig
from glob import glob

from setuptools import Extension, setup

QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of GCC's own headers
FLAGS = {"generic": []}
if sysconfig.get_platform().endswith(("x86_64", "amd64")):
    avx2 = ["-mavx2", "-mfma"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw"]
    bf16 = [*avx512, "-mavx512bf16"]
    FLAGS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": bf16, "amx": [*bf16, "-mamx-tile", "-mamx-bf16"]}

setup(
    ext_modules=[
        Extension(
            f"routeseg.engine._forward_{build}",
            ["src/routeseg/engine/kernels/forward.cpp"],
            depends=sorted(glob("src/routeseg/engine/kernels/*.h")),
            extra_compile_args=["-std=c++20", "-O3", "-fno-math-errno", "-pthread", *QUIET, *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for build, flags in FLAGS.items()
    ]
)
