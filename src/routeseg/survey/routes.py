"""Which routes a network takes over a data set, and whether they follow the scale of what is in the images: so the
paper claims (Sec. 1, Fig. 1). `routeseg routes`.

OUTPUT/routes.json, and as .png and .svg: frequency, strength, cost_histogram, extremes, groups, and, of a network whose
places leave by themselves, effort

Legend: B images, L depth, S scales.
    gates [B, L+1, S, 3]   activation of every edge; open if above 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from routeseg import figures
from routeseg.data.config import DataConfig, open_data
from routeseg.data.loaders import evaluation_loader, image_tensor
from routeseg.data.pairs import SegmentationData
from routeseg.data.scenes import PRESETS
from routeseg.data.subset import evenly_spread
from routeseg.evaluation import Evaluation, Forward, evaluate
from routeseg.evaluation.scores import finite_or_none
from routeseg.labels import label_map
from routeseg.model import DynamicRoutingNetwork
from routeseg.space import RoutingSpace
from routeseg.survey.effort import Effort, EffortNotes
from routeseg.survey.route_statistics import (
    MIN_GROUP,
    PERMUTATIONS,
    PermutationTest,
    distinct_routes,
    edge_statistics,
    in_plain_words,
    object_size,
    permutation_test,
    route_distances,
    shift_test,
    size_group_name,
    size_groups,
)

MIN_SHIFTED = 40  # images; with fewer, shifts are too few for a small p
EXTREMES = 3  # cheapest and dearest images that are drawn
DISTANCES = {"activation": False, "open": True}  # names of the two distances of route_distances, and its `binary`
WORDS = {"activation": "Activations", "open": "Sets of open edges"}
FIGURES = ("frequency", "strength", "cost_histogram", "extremes", "groups", "effort")
FIGURE_KINDS = (".png", ".svg")


def images_to_see(data: DataConfig, count: int) -> int:
    """How many images `survey_routes` runs the network over, if the data set itself has `count`."""
    return count * (len(PRESETS) + (data.preset not in PRESETS)) if data.name == "scenes" else count


@dataclass(frozen=True)
class Observation:
    """The routes of a network over a data set. [B] stands for its readable images, in the order of the set.

    images        the data set, and `indices` int64 [B], the place of each image in it
    evaluation    gates, costs and scores (see Evaluation)
    names         what the set calls the images
    sizes         (H, W) of each
    object_sizes  float64 [B], see `object_size`
    effort        where the places of images left; None: they did not by themselves
    """

    space: RoutingSpace
    images: SegmentationData
    indices: np.ndarray
    evaluation: Evaluation
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    object_sizes: np.ndarray
    effort: Effort | None

    @property
    def gates(self) -> np.ndarray:
        return self.evaluation.gates

    @property
    def cost_share(self) -> np.ndarray:
        """Real cost as a share of the full network's at the image's size, float64 [B]."""
        return self.evaluation.cost_macs / self.evaluation.full_macs


def observe(
    model: DynamicRoutingNetwork,
    images: SegmentationData,
    forward: Forward,
    workers: int = 0,
    on_image: Callable[[], None] | None = None,
) -> Observation:
    """Runs the network over a data set, one image at a time at its own size, by `forward` (an engine).

    Raises ValueError if no image can be read, or a label is outside the network's classes.
    """
    notes: list[tuple[int, str, tuple[int, int], float]] = []
    places = None if model.config.place is None else EffortNotes(forward, model)

    def noted() -> Iterator[dict[str, Any]]:
        for index, image in enumerate(evaluation_loader(images, workers)):
            if not image["skipped"]:
                labels = image["labels"][0].numpy()
                notes.append((index, image["name"], labels.shape, object_size(labels)))
            yield image
            if places is not None and not image["skipped"]:
                places.saw(image["image"], labels)
        if not notes:
            raise ValueError(
                f"none of the {len(images)} images of the data set can be read: check its files, or choose "
                "another --split or --data.root"
            )

    evaluation = evaluate(model, noted(), places or forward, on_image=on_image)
    effort = None if places is None else places.found()
    indices, names, sizes, object_sizes = zip(*notes, strict=True)
    return Observation(model.space, images, np.array(indices), evaluation, names, sizes, np.array(object_sizes), effort)


@dataclass(frozen=True)
class Group:
    """Images of one scale: gates [B,L+1,S,3], real cost as a share of the full network [B], object sizes [B]."""

    name: str
    gates: np.ndarray
    cost_share: np.ndarray
    object_sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.gates)


@dataclass(frozen=True)
class RouteSurvey:
    """Everything `routeseg routes` says.

    observation   the images of the data set
    grouped_by    "preset" or "object size"
    groups        images by scale: of each preset of scenes, or quartiles of the mean object size of the data set
    tests         by distance ("activation", "open") and kind ("permuted", "shifted"): do routes differ between groups?
                  Empty if there are too few images. Shifted only if images may come in an order (not for scenes),
                  and are enough.
    """

    observation: Observation
    grouped_by: str
    groups: tuple[Group, ...]
    tests: Mapping[str, Mapping[str, PermutationTest]]

    def as_dict(self) -> dict[str, Any]:
        """The JSON, without machine and command; shares are 0..1."""
        seen, space = self.observation, self.observation.space
        scores = seen.evaluation.as_dict()
        images = zip(
            seen.names, seen.evaluation.cost_macs / 1e9, seen.cost_share, seen.object_sizes, seen.gates > 0, strict=True
        )
        return {
            "images": scores["images"],
            "skipped": scores["skipped"],
            "precision": scores["precision"],
            "miou": scores["miou"],
            "cost_gmacs": scores["cost_gmacs"] | {"std": float(seen.evaluation.cost_macs.std() / 1e9)},
            "depth": space.depth,
            "num_scales": space.num_scales,
            "edges": edge_statistics(space, seen.gates).as_list(),
            "edges_open": edge_statistics(space, seen.gates).counts,
            "distinct_routes": distinct_routes(seen.gates),
            "per_image": [
                {
                    "name": name,
                    "cost_gmacs": float(cost),
                    "cost_share": float(share),
                    "open_edges": int(opened.sum()),
                    "object_size": finite_or_none(size),
                }
                for name, cost, share, size, opened in images
            ],
            "grouped_by": self.grouped_by,
            "groups": [self._group_dict(group) for group in self.groups],
            "group_tests": {
                distance: {kind: test.as_dict() for kind, test in tests.items()}
                for distance, tests in self.tests.items()
            },
            "in_words": self.in_words(),
            **({} if seen.effort is None else {"effort": seen.effort.as_dict()}),
        }

    def _group_dict(self, group: Group) -> dict[str, Any]:
        edges = edge_statistics(self.observation.space, group.gates)
        return {
            "name": group.name,
            "images": len(group),
            "cost_share": {f: float(getattr(group.cost_share, f)()) for f in ("mean", "min", "max", "std")},
            "open_edges": float((group.gates > 0).sum((1, 2, 3)).mean()),
            "object_size": {f: finite_or_none(getattr(group.object_sizes, f)()) for f in ("mean", "min", "max")},
            "edges": edges.as_list(),
        }

    def in_words(self) -> list[str]:
        """What the tests say, a sentence or two for each distance."""
        if not self.tests:
            return [f"Too few images to ask whether routes follow the {self.grouped_by}: give at least four."]
        return [in_plain_words(WORDS[distance], self.grouped_by, tests) for distance, tests in self.tests.items()]


def survey_routes(
    model: DynamicRoutingNetwork,
    forward: Forward,
    data: DataConfig,
    split: str = "val",
    seed: int = 0,
    images: int | None = None,
    permutations: int = PERMUTATIONS,
    on_image: Callable[[], None] | None = None,
    name: str = "the network",
) -> RouteSurvey:
    """Observes the routes over a data set, groups the images by scale and tests whether routes follow it.

    For `scenes` as many images again are drawn of each other preset. Other data are cut into quartiles of the mean
    object size of their labels (`object_size`, `size_groups`).

    forward     an engine of the model; on_image is called after each image
    images      only so many images, evenly spread over the set; None is all
    name        the network's, for error messages

    Raises ValueError if the network has no gates, or there is nothing to look at.
    """
    if not model.config.gated and model.exits is None:
        raise ValueError(
            f"{name} has no gates and no exits: its route is the same for every image. Draw it with "
            "`routeseg architectures --figure`, or see its config.json"
        )
    if permutations < 1:
        raise ValueError(f"--permutations is {permutations}: it must be at least 1")

    def seen(config: DataConfig) -> Observation:
        return observe(model, evenly_spread(open_data(config, split, seed), images), forward, data.workers, on_image)

    observation = seen(data)
    if data.name == "scenes":
        by_preset = {p: observation if p == data.preset else seen(replace(data, preset=p)) for p in PRESETS}
        groups = [Group(p, o.gates, o.cost_share, o.object_sizes) for p, o in by_preset.items()]
        return RouteSurvey(observation, "preset", tuple(groups), _tests(model.space, groups, permutations, seed))
    numbers = size_groups(observation.object_sizes)
    count = int(numbers.max()) + 1
    groups = []
    for number in range(count):
        rows = numbers == number
        groups.append(
            Group(
                size_group_name(number, count),
                observation.gates[rows],
                observation.cost_share[rows],
                observation.object_sizes[rows],
            )
        )
    in_order = numbers[numbers >= 0], observation.gates[numbers >= 0]
    return RouteSurvey(
        observation, "object size", tuple(groups), _tests(model.space, groups, permutations, seed, in_order)
    )


def _tests(
    space: RoutingSpace,
    groups: Sequence[Group],
    permutations: int,
    seed: int,
    in_order: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, dict[str, PermutationTest]]:
    """Both tests by both distances. `in_order`: group number and gates of the images in the order of the set."""
    if len(groups) < 2 or max(map(len, groups)) < MIN_GROUP:
        return {}
    tests: dict[str, dict[str, PermutationTest]] = {}
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    gates = np.concatenate([group.gates for group in groups])
    if in_order is not None:
        labels, gates = in_order
    for name, binary in DISTANCES.items():
        distances = route_distances(space, gates, binary)
        tests[name] = {"permuted": permutation_test(distances, labels, permutations, seed)}
        if in_order is not None and len(labels) >= MIN_SHIFTED:
            tests[name]["shifted"] = shift_test(distances, labels)
    return tests


def draw_survey(survey: RouteSurvey, model: DynamicRoutingNetwork, forward: Forward, folder: Path) -> list[Path]:
    """The figures of a survey, each as .png and .svg; returns their paths. `forward` segments the drawn images."""
    seen, space = survey.observation, survey.observation.space
    edges = edge_statistics(space, seen.gates)
    count = len(seen.names)
    cost = seen.evaluation.cost_macs / 1e9
    order = np.argsort(seen.cost_share, kind="stable")
    shown = max(1, min(EXTREMES, count // 2))
    rows = {"cheapest": order[:shown], "dearest": order[::-1][:shown]} if count > 1 else {"only": order}
    extremes = {
        f"The {name} images" if len(places) > 1 else f"The {name} image": [
            _panel(seen, model, forward, int(place)) for place in places
        ]
        for name, places in rows.items()
    }
    groups = [
        (f"{group.name}: {_group_line(group)}", edge_statistics(space, group.gates).frequency)
        for group in survey.groups
    ]
    there = {"groups": bool(groups), "effort": seen.effort is not None}  # no groups: every label is ignored
    written: list[Path] = []
    for kind in FIGURE_KINDS:
        paths = {n: folder / (n + kind) for n in FIGURES if there.get(n, True)}
        figures.edge_frequency(paths["frequency"], space, edges.frequency, count)
        figures.edge_strength(paths["strength"], space, edges.mean_activation, edges.mean_when_open, count)
        figures.cost_histogram(paths["cost_histogram"], cost, seen.evaluation.full_macs / 1e9)
        figures.extreme_routes(paths["extremes"], space, extremes)
        if groups:
            figures.group_frequencies(paths["groups"], space, groups)
        if seen.effort is not None:
            figures.mean_effort(paths["effort"], seen.effort.image, seen.effort.shares, seen.effort.images)
        written += paths.values()
    return written


def _group_line(group: Group) -> str:
    sizes = group.object_sizes[np.isfinite(group.object_sizes)]
    size = f"object size {100 * sizes.mean():.1f} %, " if sizes.size else ""
    images = f"{len(group)} image{'s' * (len(group) != 1)}"
    return f"{images}\n{size}cost {100 * group.cost_share.mean():.1f} % of full"


def _panel(
    seen: Observation, model: DynamicRoutingNetwork, forward: Forward, place: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Image [H,W,3], segmentation [H,W,3], gates [L+1,S,3] and title of an image."""
    image, _ = seen.images.read(int(seen.indices[place]))
    pixels = image_tensor(image)[None].to(next(model.parameters()).device)
    labels = label_map(forward(pixels).labels[0].cpu().numpy(), model.config.num_classes)
    cost, share = seen.evaluation.cost_macs[place] / 1e9, seen.cost_share[place]
    title = f"{seen.names[place]}: {cost:.3f} GMACs, {100 * share:.1f} % of full"
    tinted = figures.overlay(image, labels, model.config.class_names, model.config.palette, legend=False)
    return image, tinted, seen.gates[place], title
