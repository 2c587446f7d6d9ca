"""What arrives at a node of a routed graph: the sum over the open paths alone, chosen by nested `If`s.

A branch that is not taken gives an empty map, which nobody reads; so closed paths write no zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from routeseg.export.graph import Graph


@dataclass(frozen=True)
class Sent:
    """What may arrive at a node.

    map      [1,C,h,w]; half that size if it comes from the coarser scale (`coarser`)
    arrives  whether it does, bool [1]
    share    its activation [1,1,1,1], if the map is not yet multiplied by it
    """

    map: str
    arrives: str
    share: str | None = None
    coarser: bool = False


Group = Sequence[Sent]  # at most one of them arrives


def nothing(graph: Graph) -> list[str]:
    """A map without channels. Not as a constant, for OpenVINO takes an empty one for a list."""
    return [graph.op("ConstantOfShape", graph.constant([1, 0, 1, 1], np.int64))]


def select_or_nothing(graph: Graph, groups: Sequence[Group], arrives: str) -> str:
    """The sum of what arrives, or an empty map."""
    return graph.choose(arrives, lambda g: [select(g, groups)], nothing)[0]


def select(graph: Graph, groups: Sequence[Group]) -> str:
    """The sum of what arrives, if something does. Asks first whether all paths are open: that is one `If` deep."""
    if len(groups) == 1:
        return _select(graph, [], groups)
    everything = [group[0] for group in groups]
    all_open = reduce(lambda one, other: graph.op("And", one, other), (sent.arrives for sent in everything))
    return graph.choose(all_open, lambda g: [_sum(g, everything)], lambda g: [_select(g, [], groups)])[0]


def _select(graph: Graph, chosen: list[Sent], groups: Sequence[Group]) -> str:
    """The sum of the chosen, and of what arrives of the groups."""
    if not groups:
        return _sum(graph, chosen)
    rest = groups[1:]
    last_hope = not chosen and not rest  # something arrives, so it is one of this group

    def one_of(g: Graph, options: Group) -> str:
        if not options:
            return _select(g, chosen, rest)
        if last_hope and len(options) == 1:
            return _sum(g, options)
        first = options[0]
        return g.choose(
            first.arrives, lambda b: [_select(b, [*chosen, first], rest)], lambda b: [one_of(b, options[1:])]
        )[0]

    return one_of(graph, groups[0])


def _sum(graph: Graph, chosen: Sequence[Sent]) -> str:
    total: str | None = None
    for sent in chosen:
        out = sent.map if sent.share is None else graph.op("Mul", sent.map, sent.share)
        out = graph.resize(out, 2) if sent.coarser else out
        total = out if total is None else graph.op("Add", total, out)
    assert total is not None
    return total
