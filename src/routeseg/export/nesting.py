"""Choices of an exported graph as branches, so that a runtime computes one side alone.

A graph is built flat: all of it is computed, and each choice (`Graph.choose`) takes one of two values. So it can be
quantised, which tools for that do not do inside branches. Then `nested` moves what only one side needs into a branch of
an `If`, choices in there as well.

Each branch has constants of its own, and its own DequantizeLinear: ONNX Runtime takes what the graph around holds for
values that may change, computes convolutions with such weights in a slower layout, and int8 maps in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import helper

from routeseg.export.graph import CHOICE, FLOAT


def nested(model: onnx.ModelProto) -> onnx.ModelProto:
    """A flat model, with a branch for each side of its choices; one without any stays as it is."""
    if not any(map(is_choice, model.graph.node)):
        return model
    result, graph = onnx.ModelProto(), model.graph
    result.CopyFrom(model)
    nodes, constants, _ = _Nesting(graph).body([value.name for value in graph.output], frozenset(), "")
    for field, values in (("node", nodes), ("initializer", constants), ("value_info", [])):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(values)
    return result


def is_choice(node: onnx.NodeProto) -> bool:
    """Whether this takes its second input, a float32, if the first one is true, or else its third."""
    return node.name.startswith(CHOICE)


class _Nesting:
    """The operators of a flat graph, by number, in an order in which they can be computed."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.makers = {value: number for number, node in enumerate(self.nodes) for value in node.output}
        self.constants = {value.name: value for value in graph.initializer}

    def behind(self, values: Iterable[str], around: frozenset[int]) -> frozenset[int]:
        """The operators that make these values, but for those of the graphs around, and for the sides of choices."""
        found, left = set[int](), list(values)
        while left:
            number = self.makers.get(left.pop())
            if number is None or number in found:
                continue
            node = self.nodes[number]
            if number not in around or node.op_type == "DequantizeLinear":
                found.add(number)
                left += node.input[:1] if is_choice(node) else node.input
        return frozenset(found)

    def body(
        self, wanted: Sequence[str], around: frozenset[int], suffix: str
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]:
        """A graph that makes these values, given those of the graphs around: operators, constants, and what the values
        are called in it. What it has of its own, though others have it, too, is named with the suffix."""
        own = self.behind(wanted, around)
        choices: dict[str, list[int]] = {}  # the last of those with a condition becomes the `If` of all of them
        for number in sorted(own):
            if is_choice(self.nodes[number]):
                choices.setdefault(self.nodes[number].input[0], []).append(number)
        missing = {value for group in choices.values() for number in group for value in self.nodes[number].output}
        nodes, later = list[onnx.NodeProto](), list[onnx.NodeProto]()
        constants, names = dict[str, onnx.TensorProto](), dict[str, str]()

        def named(value: str) -> str:
            if value in self.constants and value not in constants:
                constants[value] = onnx.TensorProto()
                constants[value].CopyFrom(self.constants[value])
                names[value] = constants[value].name = value + suffix
            return names.get(value, value)

        for number in sorted(own):
            node = onnx.NodeProto()
            node.CopyFrom(self.nodes[number])
            if is_choice(node):
                group = [self.nodes[one] for one in choices[node.input[0]]]
                if node != group[-1]:
                    continue
                sides = {
                    name: self.branch([one.input[side] for one in group], around | own, f"{suffix}.{number}{name[0]}")
                    for side, name in ((1, "then_branch"), (2, "else_branch"))
                }
                outputs = [one.output[0] for one in group]
                node = helper.make_node("If", [named(node.input[0])], outputs, name=f"If_{number}", **sides)
                missing -= set(outputs)
            else:
                if number in around:
                    names.update((value, value + suffix) for value in node.output)
                    node.name += suffix
                node.input[:], node.output[:] = map(named, node.input), [names.get(one, one) for one in node.output]
                if missing & set(node.input):
                    missing |= set(node.output)
                    later.append(node)
                    continue
            nodes.append(node)
        results = [named(value) for value in wanted]
        return nodes + later, list(constants.values()), results

    def branch(self, wanted: Sequence[str], around: frozenset[int], suffix: str) -> onnx.GraphProto:
        nodes, constants, results = self.body(wanted, around, suffix)
        outputs = [f"{value}.out{suffix}" for value in results]
        for value, output in zip(results, outputs, strict=True):
            nodes.append(helper.make_node("Identity", [value], [output], name=f"Identity{output}"))
        info = [helper.make_tensor_value_info(output, FLOAT, None) for output in outputs]
        return helper.make_graph(nodes, f"branch{suffix}", [], info, constants)
