"""Known networks as routes of the space (Sec. 3.1, Table 1): FCN-32s, DeepLabV3, U-Net, HRNetV2, Auto-DeepLab.

Each is a union of walks from the stem to the decoder. A walk is drawn as {layer: scale}: from this layer on it is at
this scale. The layers are those of depth 16; at another depth they are moved in proportion. The paper shows only the
rough shapes: which layers were chosen, and how near Table 1 they come, is in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from routeseg.space import DOWN, KEEP, SCALE_STEP, UP, Edge, Route, RoutingSpace

DRAWN_DEPTH, DRAWN_SCALES = 16, 4
DIRECTION_OF_STEP = {step: direction for direction, step in SCALE_STEP.items()}


def union(space: RoutingSpace, *walks: Iterable[Edge]) -> Route:
    """The union of walks."""
    return Route(space, {edge for walk in walks for edge in walk})


def walk(space: RoutingSpace, turns: Mapping[int, int], coarsest: int = DRAWN_SCALES - 1) -> list[Edge]:
    """The edges of a path from the stem to the decoder that is at scale `turns[layer]` from that layer (of depth 16)
    on, but never coarser than `coarsest`.

    Raises ValueError if a turn changes by more than one scale, or lies outside of the space.
    """
    before = 0
    for layer, scale in sorted(turns.items()):
        if not (1 <= layer <= DRAWN_DEPTH and 0 <= scale < space.num_scales):
            raise ValueError(
                f"turn {layer}: {scale} lies outside: layers of a turn are 1 to {DRAWN_DEPTH}, scales 0 to "
                f"{space.num_scales - 1}"
            )
        if abs(scale - before) > 1:
            raise ValueError(
                f"turn {layer}: {scale} comes from scale {before}: a layer changes the scale by one at most"
            )
        before = scale
    moved = {_layer(space, turns, layer): min(scale, coarsest) for layer, scale in turns.items()}
    scales = [0]
    for layer in range(1, space.depth + 1):
        scales.append(moved.get(layer, scales[-1]))
    steps = [after - before for before, after in zip(scales, scales[1:], strict=False)]
    return [
        (layer, s, DIRECTION_OF_STEP[step]) for layer, (s, step) in enumerate(zip(scales, [*steps, 0], strict=True))
    ]


def fcn_32s(space: RoutingSpace) -> Route:
    """Down to 1/32 in one go, and back up in one go; nothing crosses over."""
    return union(space, walk(space, {9: 1, 10: 2, 11: 3, 14: 2, 15: 1, 16: 0}))


def deeplab_v3(space: RoutingSpace) -> Route:
    """Down to 1/16; there the pyramid (ASPP) looks at the features with several scales in parallel."""
    trunk = {8: 1, 12: 2}
    pyramid = [{14: 3, 15: 3}, {14: 2, 15: 2}, {14: 1, 15: 1}, {14: 1, 15: 0}]
    return union(space, *(walk(space, trunk | branch) for branch in pyramid))


def u_net(space: RoutingSpace) -> Route:
    """Down, along the bottom, back up; at each scale the features cross over, at the finest for free (Eq. 5)."""
    u = {2: 1, 4: 2, 6: 3, 11: 2, 13: 1, 15: 0}
    crossings = [walk(space, u, coarsest=scale) for scale in (1, 2)]
    free_crossing = [(_layer(space, u, 2) - 1, 0, KEEP)]  # the nodes behind it have no open path: a free skip
    return union(space, walk(space, u), *crossings, free_crossing)


def hrnet_v2(space: RoutingSpace) -> Route:
    """Every branch, once begun, keeps its resolution to the end; neighbours exchange features every other layer."""
    stages = {9: 1, 11: 2, 13: 3, 15: 3, 16: 3}  # no new scale at 15 and 16, but layers to exchange in
    branches = [walk(space, stages, coarsest=scale) for scale in range(DRAWN_SCALES)]
    exchanges: list[Edge] = []
    for stage in (9, 11, 13, 15):
        layer = _layer(space, stages, stage)
        for finer in range(stages[stage]):
            exchanges += [(layer, finer, DOWN), (layer, finer + 1, UP)]
    return union(space, *branches, exchanges)


def auto_deeplab(space: RoutingSpace) -> Route:
    """The one path that the search found: 1/8, 1/16, back to 1/8, and down again to 1/32."""
    return union(space, walk(space, {7: 1, 8: 2, 9: 1, 10: 2, 14: 3, 15: 2, 16: 1}))


@dataclass(frozen=True)
class Architecture:
    """A known network: how it is drawn, and its row of Table 1 (Cityscapes val, 1024x2048, from scratch).

    draw            RoutingSpace -> Route
    paper_miou, paper_gmacs, paper_params_m   %, GMACs and millions of parameters
    """

    name: str
    draw: Callable[[RoutingSpace], Route]
    paper_miou: float
    paper_gmacs: float
    paper_params_m: float

    def __call__(self, space: RoutingSpace) -> Route:
        """The route in this space. Raises ValueError if the space has too few layers or other scales."""
        if space.num_scales != DRAWN_SCALES:
            raise ValueError(f"{self.name} is drawn on {DRAWN_SCALES} scales, this space has {space.num_scales}")
        try:
            return self.draw(space).check()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


ARCHITECTURES = {
    "fcn-32s": Architecture("FCN-32s", fcn_32s, 66.9, 35.1, 2.9),
    "deeplabv3": Architecture("DeepLabV3", deeplab_v3, 67.0, 42.5, 3.7),
    "u-net": Architecture("U-Net", u_net, 71.6, 53.9, 6.1),
    "hrnetv2": Architecture("HRNetV2", hrnet_v2, 72.5, 62.5, 5.4),
    "auto-deeplab": Architecture("Auto-DeepLab", auto_deeplab, 67.2, 33.1, 2.5),
}


def diagonal(space: RoutingSpace) -> Route:
    """Down to the coarsest scale at once, a cell at each, and from there on all paths: what a network with exits
    (model/exits.py) runs best. Each scale has features after as few cells as can be, so that the first exits are cheap;
    the features of the finer ones cross over for free (Eq. 5)."""
    bottom = space.num_scales - 1
    return Route(space, [edge for edge in space.edges if edge[0] > bottom or edge[1] == edge[0]])


DRAWN: Mapping[str, Callable[[RoutingSpace], Route]] = {**ARCHITECTURES, "diagonal": diagonal}  # by name


def architecture(name: str, space: RoutingSpace) -> Route:
    """The route of this name. Raises ValueError for another name, and if the space cannot hold it."""
    if name not in DRAWN:
        raise ValueError(f"no route {name!r}: choose one of {', '.join(DRAWN)}")
    return DRAWN[name](space)


def common_route(gates: np.ndarray, threshold: float = 0.5) -> Route:
    """The paths that a dynamic network keeps open often: Common-A, B, C of Table 1, when drawn from Dynamic-A, B, C.

    gates      activations over a data set [images, L+1, S, 3]
    threshold  an edge is kept if it is open (activation above 0) in at least this share of the images, 0..1

    Edges that no open path leads to any more are pruned; a free skip of a node that is open in other images does not
    count as a path. Raises ValueError if that leaves no edge, or for other shapes.
    """
    values = np.asarray(gates)
    if values.ndim != 4 or values.shape[-1] != 3 or len(values) == 0:
        raise ValueError(f"gates have shape {list(values.shape)}: expected [images,L+1,S,3] with at least one image")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it is a share of the images, above 0 and at most 1")
    frequency = (values > 0).mean(axis=0)
    space = RoutingSpace(depth=values.shape[1] - 1, num_scales=values.shape[2])
    route = Route(space, np.argwhere(frequency >= threshold).tolist()).pruned()
    if not len(route):
        raise ValueError(
            f"a threshold of {threshold:g} closes everything: no path from the stem is open in that share of the "
            f"{len(values)} images (the most frequent edge: {frequency.max():.2f}). Choose a lower one"
        )
    return route


def _layer(space: RoutingSpace, turns: Iterable[int], layer: int) -> int:
    """The layer of the space at which a turn lies that is drawn at `layer` of depth 16. Turns move in proportion, and
    each lies at least a layer behind the one before. Raises ValueError if they find no room."""
    drawn = sorted(turns)
    if len(drawn) > space.depth:
        raise ValueError(f"depth {space.depth} is too small: its {len(drawn)} turns need as many layers")
    places: list[int] = []
    for k, at in enumerate(drawn):
        earliest = places[-1] + 1 if places else 1
        latest = space.depth - (len(drawn) - 1 - k)
        places.append(min(max(round(at * space.depth / DRAWN_DEPTH), earliest), latest))
    return places[drawn.index(layer)]
