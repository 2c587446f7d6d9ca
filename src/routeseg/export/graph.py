"""A small builder of ONNX graphs: operators are added one by one, each weight stands once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

OPSET = 18  # the lowest whose Reduce operators all take their axes as an input
FLOAT = onnx.TensorProto.FLOAT
CHOICE = "choose"  # how the names of choices begin (nesting.py)
IR_VERSION = 8  # of the same release of ONNX; ONNX Runtime 1.20 reads up to 10


class Graph:
    """A graph in the making. Values are names, as in ONNX itself."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}  # and constants, by what they hold
        self.count, self.prefix = 0, ""

    def name(self, hint: str) -> str:
        """A name that no other value has."""
        self.count += 1
        return f"{hint}_{self.count}"

    @contextmanager
    def within(self, prefix: str) -> Iterator[None]:
        """The weights of a part that calls them as another one does have this before their names."""
        self.prefix = prefix
        yield
        self.prefix = ""

    def several(self, operator: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Adds an operator; the names of its `count` outputs."""
        outputs = [self.name(operator.lower()) for _ in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=self.name(operator), **attributes))
        return outputs

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator; the name of its one output. The input "" is one that is left out."""
        return self.several(operator, inputs, 1, **attributes)[0]

    def tensor(self, name: str, value: np.ndarray) -> str:
        """A weight, by its name in the network."""
        name = self.prefix + name
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small constant."""
        array = np.asarray(value, dtype=dtype)
        key = f"{array.dtype} {array.shape} {array.tobytes().hex()}"
        if key not in self.weights:
            self.weights[key] = numpy_helper.from_array(array, self.name("constant"))
        return self.weights[key].name

    def integers(self, value: Any) -> str:
        """A small constant of int64."""
        return self.constant(value, np.int64)

    def as_float(self, value: str) -> str:
        """0 and 1 of bools."""
        return self.op("Cast", value, to=FLOAT)

    def sequence(self, module: nn.Sequential, name: str, x: str) -> str:
        """Padding, convolutions and ReLUs in a row, also nested."""
        for key, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                x = self.conv(layer, f"{name}.{key}", x)
            elif isinstance(layer, nn.ReLU):
                x = self.op("Relu", x)
            elif isinstance(layer, nn.ReLU6):
                x = self.op("Clip", x, self.constant(0.0), self.constant(layer.max_val))
            elif isinstance(layer, nn.ZeroPad2d):
                left, right, top, bottom = layer.padding
                x = self.op("Pad", x, self.integers([0, 0, top, left, 0, 0, bottom, right]))
            elif isinstance(layer, nn.Sequential):
                x = self.sequence(layer, f"{name}.{key}", x)
            else:
                assert isinstance(layer, nn.Identity)  # in place of a BatchNorm
        return x

    def conv(self, conv: nn.Conv2d, name: str, x: str, stride: int | None = None) -> str:
        """The convolution of this name, with its bias if it has one; `stride` in place of its own."""
        inputs = [x, self.tensor(f"{name}.weight", conv.weight.detach().numpy())]
        if conv.bias is not None:
            inputs.append(self.tensor(f"{name}.bias", conv.bias.detach().numpy()))
        assert isinstance(conv.padding, tuple)
        step = list(conv.stride) if stride is None else [stride, stride]
        return self.op(
            "Conv",
            *inputs,
            kernel_shape=list(conv.kernel_size),
            strides=step,
            pads=[*conv.padding, *conv.padding],
            group=conv.groups,
        )

    def resize(self, x: str, factor: int) -> str:
        """`upsample` of model/layers.py: bilinear, corners not aligned."""
        scales = self.constant([1, 1, factor, factor])
        return self.op("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")

    def choose(self, condition: str, then: str, otherwise: str) -> str:
        """One of two values, float32. In the finished file what only one of them needs is computed if it is taken."""
        output = self.name(CHOICE)
        self.nodes.append(helper.make_node("Where", [condition, then, otherwise], [output], name=output))
        return output

    def size(self, x: str) -> str:
        """Height and width of maps [B,C,h,w]: int64 [2]."""
        return self.op("Shape", x, start=2, end=4)

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: dict[str, tuple[str, int, Sequence[int | str]]],
        properties: dict[str, str],
    ) -> onnx.ModelProto:
        """The finished model. `outputs`: name -> (value, type of its elements, shape)."""
        results = []
        for name, (value, kind, shape) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name], name=self.name("Output")))
            results.append(helper.make_tensor_value_info(name, kind, shape))
        graph = helper.make_graph(self.nodes, "routeseg", list(inputs), results, list(self.weights.values()))
        model = helper.make_model(
            graph, producer_name="routeseg", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        helper.set_model_props(model, properties)
        return model
