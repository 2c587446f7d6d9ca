"""How near each kernel of the CPU engine comes to what the machine can do.

    python benchmarks/kernels.py                  # the best build, to results/kernels_cpu_<build>.json
    python benchmarks/kernels.py --build avx2     # another one that this machine runs

Kernels that multiply are held against the rate of torch.mm of large matrices in the same precision, the others against
the rate of copying memory. The maps are those of a network at the size of an image: scale s has 1 / (4 * 2**s) of its
height and width, and `channels * 2**s` channels. Methods take turns. Within a turn calls follow each other, so what
fits into the cache is found there.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from ctypes import addressof, c_int, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference import read_size
from inference_methods import Method, alternate, in_words, products
from routeseg.engine import compiled
from routeseg.engine.compiled import BUILDS, Weights, find_library, raise_failure
from routeseg.evaluation import machine_facts
from routeseg.files import write_json
from routeseg.model.gate import shrink
from routeseg.model.layers import InputNorm, Subsample, upsample
from routeseg.model.operations import SepConv3x3, SepConv5x5
from routeseg.space import STEM_STRIDE

TURN_MS = 5.0  # of the calls that follow each other in a turn
COPY_BYTES = 2**26  # larger than the caches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """A call of a kernel. `gmacs` or `gbytes` is its work; `expected` computes with PyTorch what `found` holds."""

    name: str
    precision: str
    call: Callable[[], object]
    found: Tensor
    expected: Callable[[], Tensor]
    gmacs: float = 0.0
    gbytes: float = 0.0


class Kernels:
    """The kernels of one library in one precision. Maps are [h,w,c]."""

    def __init__(self, library: ctypes.CDLL, precision: str, threads: int) -> None:
        self.library, self.precision, self.threads = library, precision, threads
        self.dtype = getattr(torch, precision)
        self.kept: list[object] = []  # what the structures point to

    def random(self, h: int, w: int, c: int) -> Tensor:
        return torch.randn(h, w, c).to(self.dtype)

    def map(self, tensor: Tensor) -> Any:
        h, w, c = tensor.shape
        self.kept.append(tensor)
        return compiled._Map(tensor.data_ptr(), h, w, c, 0, h)

    def call(self, kernel: str, *arguments: Any) -> Callable[[], None]:
        """A call of the library's function; structures are passed by their addresses."""
        self.kept.append(arguments)
        function = getattr(self.library, f"routeseg_{kernel}")
        passed = [
            argument if argument is None or isinstance(argument, c_int) else c_void_p(address(argument))
            for argument in arguments
        ]
        return lambda: raise_failure(self.library, function(*passed, c_int(self.threads)), kernel)

    def convolution(
        self, name: str, layers: Sequence[nn.Module], size: tuple[int, int], epilogue: str = "relu", image: bool = False
    ) -> Case:
        """Layers as `Weights.conv` takes them, on a map of this size.

        epilogue  relu; add: ReLU of the result and another map; float: the result in float32; sum: over the pixels,
                  after ReLU
        """
        weights = Weights(self.dtype, self.library.routeseg_vector(), self.library.routeseg_panel())
        conv = weights.conv(layers, image=image, wide=epilogue == "float")
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        x = self.random(*size, conv.inputs)
        if not image:
            x[..., convs[-1].in_channels :] = 0
        pixels = x.float().permute(2, 0, 1)[None, : convs[-1].in_channels]
        h, w = nn.Sequential(*layers)(pixels).shape[-2:]
        outputs = convs[-1].out_channels
        out = torch.empty(h, w, conv.outputs, dtype=torch.float32 if epilogue == "float" else self.dtype)
        residual = self.random(h, w, conv.outputs) if epilogue == "add" else None
        sums = torch.zeros(conv.outputs) if epilogue == "sum" else None

        def expected() -> Tensor:
            result = nn.Sequential(*layers)(pixels)[0].permute(1, 2, 0)
            if residual is not None:
                result = result + residual[..., :outputs]
            result = result if epilogue == "float" else result.relu()
            return result.sum(dim=(0, 1)) if epilogue == "sum" else result

        self.kept.append(weights)
        run = self.call(
            f"convolve_{self.precision}", conv, self.map(x), self.map(out), residual, c_int(epilogue != "float"), sums
        )
        found = out[..., :outputs] if sums is None else sums[:outputs]
        macs = h * w * sum(layer.weight.numel() for layer in convs)
        call = run if sums is None else lambda: (sums.zero_(), run())
        return Case(f"{name}, {epilogue}", self.precision, call, found, expected, gmacs=macs / 1e9)

    def sum(self, name: str, size: tuple[int, int], channels: int, whole: int, halved: int) -> Case:
        """Eq. 5: weighted maps; `halved` of them (0 or 1) have half the size."""
        h, w = size
        maps = [self.random(h, w, channels) for _ in range(whole)]
        maps += [self.random(h // 2, w // 2, channels) for _ in range(halved)]
        weights = [0.25 * (1 + number) for number in range(len(maps))]
        out = torch.empty(h, w, channels, dtype=self.dtype)
        summands = (compiled._Summand * len(maps))()
        for number, x in enumerate(maps):
            summands[number] = compiled._Summand(self.map(x), weights[number], number >= whole)

        def expected() -> Tensor:
            planes = [x.float().permute(2, 0, 1)[None] for x in maps]
            full = [upsample(plane) if number >= whole else plane for number, plane in enumerate(planes)]
            return sum(weight * x for weight, x in zip(weights, full, strict=True))[0].permute(1, 2, 0)

        call = self.call(f"assemble_{self.precision}", summands, c_int(len(maps)), self.map(out))
        return self.memory_case(f"{name}, {whole} whole, {halved} halved", call, [*maps, out], out, expected)

    def shrink(self, name: str, size: tuple[int, int], channels: int) -> Case:
        x = self.random(*size, channels)
        made = shrink(x.float().permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        out = torch.empty(made.shape, dtype=self.dtype)
        call = self.call(f"shrink_{self.precision}", self.map(x), self.map(out))
        read = torch.empty(4, *out.shape, dtype=self.dtype)  # four pixels for each, not all of the map
        return self.memory_case(name, call, [read, out], out, lambda: made)

    def normalize(self, name: str, size: tuple[int, int], pixels: torch.dtype) -> Case:
        h, w = size
        image = (torch.rand(3, h, w) * (255 if pixels == torch.uint8 else 1)).to(pixels)
        out = torch.empty(h, w, 3, dtype=self.dtype)
        self.kept.append(image)
        steps = image.stride()
        structure = compiled._Image(image.data_ptr(), *steps, h, w, pixels == torch.uint8, MEAN, STD)
        call = self.call(f"normalize_{self.precision}", structure, self.map(out))
        expected = partial(_normalized, image)
        return self.memory_case(name, call, [image, out], out, expected)

    def enlarge(self, name: str, size: tuple[int, int], classes: int) -> Case:
        """Scores to logits of four times their height and width; in float32 alone."""
        h, w = size
        vector = self.library.routeseg_vector()
        scores = torch.randn(h, w, -(-classes // vector) * vector)
        out = torch.empty(classes, STEM_STRIDE * h, STEM_STRIDE * w)
        height, width = c_int(STEM_STRIDE * h), c_int(STEM_STRIDE * w)
        call = self.call("enlarge", self.map(scores), c_int(classes), out, height, width)
        return self.memory_case(
            name,
            call,
            [scores, out],
            out,
            lambda: upsample(scores[..., :classes].permute(2, 0, 1)[None], STEM_STRIDE)[0],
        )

    def memory_case(
        self, name: str, call: Callable, touched: Sequence[Tensor], found: Tensor, expected: Callable[[], Tensor]
    ) -> Case:
        gbytes = sum(x.numel() * x.element_size() for x in touched) / 1e9
        return Case(name, self.precision, call, found, expected, gbytes=gbytes)


def _normalized(image: Tensor) -> Tensor:
    return InputNorm(MEAN, STD)(image[None])[0].permute(1, 2, 0)


def address(argument: Any) -> int:
    return argument.data_ptr() if isinstance(argument, Tensor) else addressof(argument)


def cases(kernels: Kernels, args: Namespace) -> Iterator[Case]:
    """Every kernel, as the forward of a network calls it."""
    image, base = args.size, args.channels
    half = (image[0] // 2 - 1, image[1] // 2 - 1)  # behind the stem's first convolution, which has no padding
    stem = partial(nn.Conv2d, kernel_size=3, stride=2)
    yield kernels.convolution("stem 1", [stem(3, base)], image, image=True)
    yield kernels.convolution("stem 2", separable(base, base, 3), half)
    yield kernels.convolution("stem 3", separable(base, base, 3, stride=2), half)
    for scale in range(args.scales):
        size = (image[0] // STEM_STRIDE >> scale, image[1] // STEM_STRIDE >> scale)
        c, at = base * 2**scale, f"scale {scale}"
        for epilogue in ("relu", "add", "float"):
            yield kernels.convolution(f"1x1, {at}", [nn.Conv2d(c, c, 1)], size, epilogue)
        yield kernels.convolution(f"gate, {at}", [nn.Conv2d(c, c // 2, 1)], size, "sum")
        yield kernels.convolution(f"up, {at}", [nn.Conv2d(c, c // 2, 1)], size)
        yield kernels.convolution(f"down, {at}", [Subsample(), nn.Conv2d(c, c * 2, 1)], size)
        for kernel in (operation.kernel_size for operation in (SepConv3x3, SepConv5x5)):
            for epilogue in ("relu", "add"):
                yield kernels.convolution(f"separable {kernel}x{kernel}, {at}", separable(c, c, kernel), size, epilogue)
        for whole, halved in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1)):
            yield kernels.sum(f"sum, {at}", size, c, whole, halved)
        yield kernels.shrink(f"shrink, {at}", size, c)
    scores = (image[0] // STEM_STRIDE, image[1] // STEM_STRIDE)
    yield kernels.convolution("predictor", [nn.Conv2d(base, args.classes, 3, padding=1)], scores, "float")
    for pixels in (torch.uint8, torch.float32):
        yield kernels.normalize(f"normalize {str(pixels).removeprefix('torch.')}", image, pixels)
    if kernels.precision == "float32":
        yield kernels.enlarge("enlarge", scores, args.classes)


def separable(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, kernel, stride, padding=kernel // 2, groups=inputs, bias=False)
    return [depthwise, nn.Conv2d(inputs, outputs, 1)]


@torch.inference_mode()
def measure(library: ctypes.CDLL, args: Namespace) -> dict[str, Any]:
    """The bounds, and for each kernel its times and its share of its bound, by fastest turns and by medians."""
    precisions = [p for p in ("float32", "bfloat16") if hasattr(library, f"routeseg_forward_{p}")]
    source, target = torch.zeros(2, args.copy_bytes, dtype=torch.uint8)
    copy = Method("copy", partial(target.copy_, source), {"gbytes": 2 * args.copy_bytes / 1e9})
    methods, made = [*products("cpu", precisions, args.product), copy], []
    for precision in precisions:
        made += list(cases(Kernels(library, precision, args.threads), args))
    for case in made:
        calls = calls_of_a_turn(case.call)
        facts = {"precision": case.precision, "calls": calls}
        facts |= {"gmacs": case.gmacs} if case.gmacs else {"gbytes": case.gbytes}
        methods.append(Method(f"{case.name}, {case.precision}", partial(repeat, case.call, calls), facts))
    found = alternate(methods, args.seconds, seed=args.seed)
    bounds = {p: rates(found[f"product {p}"]) for p in precisions}
    rows = {name: rates(row) for name, row in found.items() if "calls" in row}
    copied = rates(found["copy"])
    for row in rows.values():
        bound = bounds[row["precision"]] if "gmacs" in row else copied
        for key in ("rate", "median_rate"):
            row[f"{key}_of_bound"] = row[key] / bound[key]
    return {"products": bounds, "copy": copied, "kernels": rows}


def rates(row: dict) -> dict:
    """The row with times of one call, and GFLOP/s (2 for each multiply-add) or GB/s: `rate` of the fastest turn."""
    calls, work = row.get("calls", 1), 2 * row["gmacs"] if "gmacs" in row else row["gbytes"]
    times = {key: row[key] / calls for key in ("median_ms", "min_ms")}
    return row | times | {"rate": 1e3 * work / times["min_ms"], "median_rate": 1e3 * work / times["median_ms"]}


def calls_of_a_turn(call: Callable[[], object]) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, math.ceil(TURN_MS / (1000 * (time.perf_counter() - start))))


def repeat(call: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        call()


def table(results: dict[str, Any]) -> str:
    lines = ["| kernel | ms | GFLOP/s | GB/s | of the bound |", "|---" * 5 + "|"]
    for name, row in results["kernels"].items():
        rate = f"{row['rate']:.0f} | |" if "gmacs" in row else f"| {row['rate']:.1f} |"
        lines.append(f"| {name} | {row['min_ms']:.3f} | {rate} {100 * row['rate_of_bound']:.0f} % |")
    return "\n".join(lines)


def runnable_builds() -> tuple[str, ...]:
    """The builds that this machine runs and has, the best one last."""
    best = find_library(torch.float32)
    level = -1 if best is None else best.routeseg_level()
    return tuple(build for build in BUILDS[: level + 1] if compiled._load(build) is not None)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    builds = runnable_builds()
    if not builds:
        parser.error("there are no kernels: install a C++ compiler, then routeseg again")
    parser.add_argument("--build", choices=builds, default=builds[-1])
    parser.add_argument("--size", type=read_size, default=(512, 1024), help="of the image, such as 512x1024")
    parser.add_argument("--channels", type=int, default=64, help="at scale 0, whole vectors")
    parser.add_argument("--scales", type=int, default=4)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--product", type=int, help="rows and columns of the matrices whose product is the bound")
    parser.add_argument("--copy-bytes", type=int, default=COPY_BYTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(words)
    library = compiled._load(args.build)
    if library is None:
        parser.error(f"the build {args.build} is not there: install a C++ compiler, then routeseg again")
    if args.channels % (2 * library.routeseg_vector()):
        parser.error(f"--channels {args.channels}: it must be a multiple of {2 * library.routeseg_vector()}")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    results = measure(library, args)
    print(table(results))
    network = {"size": in_words(args.size), "channels": args.channels, "scales": args.scales, "classes": args.classes}
    settings = {"build": args.build, "network": network, "seconds": args.seconds, "seed": args.seed}
    write_json(args.output or Path(f"results/kernels_cpu_{args.build}.json"), settings | results | machine_facts())


if __name__ == "__main__":
    main(sys.argv[1:])
