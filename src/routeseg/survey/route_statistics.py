"""Statistics of routes: how often each edge is open, how far routes are apart, and whether they follow a grouping of
the images, such as by the size of what is in them. Arrays only; routes.py takes them over a data set.

Legend: B images, L depth, S scales, E legal edges, G groups, P permutations, H, W image size.
    gates [B, L+1, S, 3]   activation of every edge; open if above 0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from routeseg.labels import IGNORE
from routeseg.space import DIRECTIONS, RoutingSpace

SIZE_GROUPS = 4  # quartiles of the object size
SIGNIFICANT = 0.05  # p below this is called a difference in words
MIN_GROUP = 2  # images of a group; a distance within it needs a pair
PERMUTATIONS = 10_000
PERMUTATIONS_AT_ONCE = 250  # keeps the working set below some ten megabytes at hundreds of images


# --- Edges ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeStatistics:
    """How each edge is used over the images; float64 [L+1,S,3], 0 on edges that the space does not have.

    frequency        share of the images in which it is open, 0..1
    mean_activation  over all images; a closed edge counts as 0
    mean_when_open   over the images in which it is open; 0 if it never is
    """

    space: RoutingSpace
    frequency: np.ndarray
    mean_activation: np.ndarray
    mean_when_open: np.ndarray

    def as_list(self) -> list[dict[str, Any]]:
        """The JSON: one object per legal edge, layer by layer; `mean_when_open` is null if it never is."""
        return [
            {
                "layer": edge[0],
                "scale": edge[1],
                "direction": DIRECTIONS[edge[2]],
                "frequency": float(self.frequency[edge]),
                "mean_activation": float(self.mean_activation[edge]),
                "mean_when_open": float(self.mean_when_open[edge]) if self.frequency[edge] else None,
            }
            for edge in self.space.edges
        ]

    @property
    def counts(self) -> dict[str, int]:
        """How many edges are open in every image, in some, in none."""
        share = self.frequency[self.space.legal]
        always, never = int((share == 1).sum()), int((share == 0).sum())
        return {"always": always, "sometimes": share.size - always - never, "never": never}


def edge_statistics(space: RoutingSpace, gates: np.ndarray) -> EdgeStatistics:
    """How often and how strongly each edge is open in `gates` [B,L+1,S,3].

    Raises ValueError if the gates do not fit the space, or there is no image.
    """
    gates = np.asarray(gates, dtype=np.float64)
    if gates.ndim != 4 or gates.shape[1:] != space.legal.shape or not len(gates):
        raise ValueError(f"gates have shape {gates.shape}, the space needs {('images', *space.legal.shape)}")
    gates = np.where(space.legal, gates, 0)
    images_open = (gates > 0).sum(0)
    return EdgeStatistics(
        space=space,
        frequency=images_open / len(gates),
        mean_activation=gates.mean(0),
        mean_when_open=gates.sum(0) / np.maximum(images_open, 1),
    )


def distinct_routes(gates: np.ndarray) -> int:
    """How many different sets of open edges there are among `gates` [B,L+1,S,3]."""
    return len(np.unique((np.asarray(gates) > 0).reshape(len(gates), -1), axis=0))


# --- Distances and the permutation test -----------------------------------------------------------------------------


def route_distances(space: RoutingSpace, gates: np.ndarray, binary: bool = False) -> np.ndarray:
    """Distance between the routes of every two images of `gates` [B,L+1,S,3]: float64 [B,B] in 0..1.

    The mean over the legal edges of the absolute difference of their activations; with `binary`, of being open (1) or
    closed (0): the share of the edges that are open in one image and closed in the other (Hamming).
    """
    values = np.asarray(gates)[:, space.legal]  # [B,E]
    values = (values > 0).astype(np.float64) if binary else values.astype(np.float64)
    return np.stack([np.abs(values - one).mean(1) for one in values])


@dataclass(frozen=True)
class PermutationTest:
    """Mean distance of two images of different groups against that of two images of one group.

    between, within  means over all pairs of either kind
    p_value          share of the relabellings whose `between - within` is at least the one observed; one-sided. The
                     observed labelling counts among them (the +1 rule), so it is never 0
    relabellings     how many were tried
    """

    between: float
    within: float
    p_value: float
    relabellings: int

    @property
    def difference(self) -> float:
        """The statistic: between - within."""
        return self.between - self.within

    def as_dict(self) -> dict[str, float | int]:
        return {
            "mean_between": self.between,
            "mean_within": self.within,
            "difference": self.difference,
            "p_value": self.p_value,
            "relabellings": self.relabellings,
        }


def permutation_test(
    distances: np.ndarray, groups: Sequence[int] | np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0
) -> PermutationTest:
    """Do images of one group differ less from each other than from those of other groups?

    distances  symmetric [B,B], 0 on the diagonal
    groups     the group of each image [B], whole numbers
    Labels are permuted over the images at random, which supposes that images are independent of each other.

    Raises ValueError if there are fewer than two groups, or none has two images.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(groups)
    return _test(distances, labels, (rng.permutation(labels) for _ in range(permutations)))


def shift_test(distances: np.ndarray, groups: Sequence[int] | np.ndarray) -> PermutationTest:
    """As `permutation_test`, with the labels shifted along the images by 1, 2, ..., B-1 places, and around the end.

    For images that come in an order, such as frames of a video: neighbours stay neighbours, so that their likeness
    alone makes no difference look sure. No randomness; p is at least 1/B.
    """
    labels = np.asarray(groups)
    return _test(distances, labels, (np.roll(labels, shift) for shift in range(1, len(labels))))


def _test(distances: np.ndarray, labels: np.ndarray, relabellings: Iterable[np.ndarray]) -> PermutationTest:
    distances = np.asarray(distances, dtype=np.float64)
    if distances.shape != (len(labels), len(labels)):
        raise ValueError(f"distances have shape {distances.shape}, there are {len(labels)} labels: give [B,B] and [B]")
    names, sizes = np.unique(labels, return_counts=True)
    if len(names) < 2 or sizes.max() < MIN_GROUP:
        raise ValueError(f"groups of {sizes.tolist()} images: a test needs two groups, and one with two images")
    pairs = len(labels) * (len(labels) - 1) / 2
    pairs_within = float((sizes * (sizes - 1) / 2).sum())  # a relabelling keeps the sizes of the groups
    total = distances.sum() / 2

    def means(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean distance between and within groups of each labelling, from labels [P,B]: two arrays [P]."""
        member = (rows.T[..., None] == names).astype(np.float64)  # [B,P,G]
        reached = (distances @ member.reshape(len(labels), -1)).reshape(member.shape)
        within = (reached * member).sum((0, 2)) / 2
        return (total - within) / (pairs - pairs_within), within / pairs_within

    between, within = (float(mean[0]) for mean in means(labels[None]))
    observed, rounding = between - within, 1e-12 * max(total / pairs, 1e-300)
    count, as_large = 0, 0
    for rows in _chunks(relabellings, PERMUTATIONS_AT_ONCE):
        shuffled_between, shuffled_within = means(rows)
        count += len(rows)
        as_large += int((shuffled_between - shuffled_within >= observed - rounding).sum())
    return PermutationTest(between, within, (1 + as_large) / (1 + count), count)


def _chunks(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    chunk: list[np.ndarray] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def in_plain_words(what: str, grouped_by: str, tests: Mapping[str, PermutationTest]) -> str:
    """What the tests "permuted" and (if there) "shifted" say: one sentence, whichever way they come out."""
    test, shifted = tests["permuted"], tests.get("shifted")
    means = f"mean distance {test.between:.4f} between groups, {test.within:.4f} within"
    p = f"p = {test.p_value:.2g} of {test.relabellings} permutations"
    if shifted is not None:
        p += f", {shifted.p_value:.2g} of {shifted.relabellings} shifts that keep neighbours together"
    if test.p_value >= SIGNIFICANT:
        return f"{what} do not visibly follow the {grouped_by}: {means} ({p})."
    more = f"{100 * test.difference / test.within:.1f} % more" if test.within > 0 else "none within a group"
    if shifted is not None and shifted.p_value >= SIGNIFICANT:
        doubt = "but that may come from the likeness of neighbouring images alone"
        return f"{what} differ between groups by {grouped_by}, {doubt}: {means}, {more} ({p})."
    return f"{what} follow the {grouped_by}: {means}, {more} ({p})."


# --- Groups by scale -------------------------------------------------------------------------------------------------


def object_size(labels: np.ndarray) -> float:
    """Mean size of what is in a label map [H,W], as a share of the image's: in (0, 1], nan if all is ignored.

    An object is an 8-connected component of one class (IGNORE has none), its size the side of a square of its area,
    s = sqrt(pixels). The mean weights every object by its own size, sum(s * s) / sum(s), and is divided by
    sqrt(H * W). So it does not depend on the resolution. One class everywhere gives 1, a chequerboard of n fields
    1 / sqrt(n). The many stray pixels of label maps hardly count, and sky and road alone do not decide it.
    """
    labels = np.asarray(labels)
    areas = [np.empty(0)]
    for value in np.unique(labels[labels != IGNORE]):
        stats = cv2.connectedComponentsWithStats((labels == value).astype(np.uint8), connectivity=8)[2]
        areas.append(stats[1:, cv2.CC_STAT_AREA].astype(np.float64))  # 0 is the background
    area = np.concatenate(areas)
    return float(area.sum() / np.sqrt(area).sum() / np.sqrt(labels.size)) if area.size else float("nan")


def size_groups(sizes: Sequence[float] | np.ndarray) -> np.ndarray:
    """The quartile (0 the smallest) of each object size [B], by rank: int64 [B]; -1 if the size is nan.

    Groups differ by at most one image; with too few images for SIZE_GROUPS groups of MIN_GROUP there are fewer.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    order = np.argsort(sizes, kind="stable")[: int(np.isfinite(sizes).sum())]  # nan comes last
    groups = np.full(len(sizes), -1)
    for number, members in enumerate(np.array_split(order, max(1, min(SIZE_GROUPS, len(order) // MIN_GROUP)))):
        groups[members] = number
    return groups


def size_group_name(number: int, count: int = SIZE_GROUPS) -> str:
    """What a group of `size_groups` is called in tables and figures, of `count` (1 to SIZE_GROUPS) groups."""
    if count == 1:
        return "all images"
    part = {2: "half", 3: "third", 4: "quartile"}[count]
    ends = {0: ", smallest objects", count - 1: ", largest objects"}
    return f"{part} {number + 1}{ends.get(number, '')}"
