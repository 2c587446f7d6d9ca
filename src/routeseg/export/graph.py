"""A small builder of ONNX graphs: operators are added one by one, each weight stands once, in the outermost graph.

A branch of an `If` could use it from there. But ONNX Runtime takes a weight of the graph around for a value that may
change, and computes the convolutions of the branch in its slower layout: twice the time. A branch therefore has a
reshaped copy, which runtimes make when they load the file: then it is a constant of the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

OPSET = 18  # the lowest whose Reduce operators all take their axes as an input
FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
IR_VERSION = 8  # of the same release of ONNX; ONNX Runtime 1.20 reads up to 10


class Graph:
    """The outermost graph, or (with a parent) a branch of an `If`, which sees every value of the graphs around it.

    Values are names, as in ONNX itself.
    """

    def __init__(self, parent: Graph | None = None) -> None:
        self.root: Graph = self if parent is None else parent.root
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()  # the values that this graph's own operators give
        self.weights: dict[str, onnx.TensorProto] = {}  # and constants, by what they hold
        self.copies: dict[str, str] = {}  # of weights
        if parent is None:
            self.count = 0

    def name(self, hint: str) -> str:
        """A name that no other value has."""
        self.root.count += 1
        return f"{hint}_{self.root.count}"

    def several(self, operator: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Adds an operator; the names of its `count` outputs."""
        outputs = [self.name(operator.lower()) for _ in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=self.name(operator), **attributes))
        self.made.update(outputs)
        return outputs

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator; the name of its one output. The input "" is one that is left out."""
        return self.several(operator, inputs, 1, **attributes)[0]

    def tensor(self, name: str, value: np.ndarray) -> str:
        """A weight, by its name in the network: itself in the outermost graph, a copy in a branch."""
        if name not in self.root.weights:
            self.root.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if self is self.root:
            return name
        if name not in self.copies:
            self.copies[name] = self.op("Reshape", name, self.constant(value.shape, np.int64))
        return self.copies[name]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small constant of this graph."""
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

    def choose(
        self,
        condition: str,
        then: Callable[[Graph], Sequence[str]],
        otherwise: Callable[[Graph], Sequence[str]],
        elements: Sequence[int] = (FLOAT,),
    ) -> list[str]:
        """An `If`: each function adds a branch's operators and gives its outputs, of these element types."""
        branches = {}
        for attribute, build in (("then_branch", then), ("else_branch", otherwise)):
            branch = Graph(self)
            values = [v if v in branch.made else branch.op("Identity", v) for v in build(branch)]
            assert len(values) == len(elements) and len(set(values)) == len(values)
            outputs = [helper.make_tensor_value_info(v, kind, None) for v, kind in zip(values, elements, strict=True)]
            branches[attribute] = helper.make_graph(
                branch.nodes, self.name("branch"), [], outputs, list(branch.weights.values())
            )
        return self.several("If", [condition], len(elements), **branches)

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: dict[str, tuple[str, Sequence[int | str]]],
        properties: dict[str, str],
    ) -> onnx.ModelProto:
        """The finished model. `outputs`: name -> (value, shape), all float32."""
        for name, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name], name=self.name("Output")))
        results = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "routeseg", list(inputs), results, list(self.weights.values()))
        model = helper.make_model(
            graph, producer_name="routeseg", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        helper.set_model_props(model, properties)
        return model
