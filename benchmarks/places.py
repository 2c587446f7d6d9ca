"""What it is worth that places of an image choose how far they go: scores against cost, beside what is cheaper to have.

    python benchmarks/places.py results/camvid_wide --data.name camvid --data.root data/camvid \\
        --output results/places_camvid_wide.json

A network without places is looked at as if it had them, with --place. For the validation images it writes, in shares of
what the network costs with all layers at the image's own size,

    exits   all images leave at one exit
    sizes   all layers, of the image at other sizes, as labels of its own size
    walked  places at each of PRICES and each of --walked, as the network runs: places that have left stay as they are
    closer  of each of --closer, two sizes, at CLOSER: a first look, and a closer one where that is unsure
    frontier  of a calibrated network: each of FRONTIER as a budget, which chooses the size, too
    chosen  at each of BUDGETS, from what every exit makes of the image if all layers run everywhere:
              images     each image leaves where its mean entropy is below a threshold
              places     the same of each place
              shuffled   places exchange their exits within their image
              exchanged  images exchange their maps of exits
              common     all leave at one exit, or at one of two neighbours by chance
              oracle     the labels choose: least wrong pixels, each counts 1 / the pixels of its class, plus a price
    kept    of a calibrated network: what is spent of ASKED on other sources, as a mean over the images, by the tables
            alone, and with per_image, the mean and the largest distance of an image; on the same images at half and
            twice the size, darkened, blurred and noisy, and on the images of the folders that --others names

    follows of a calibrated network, whose images are looked at in their own size for a budget of half of the cost: rank
            correlations of what an image costs with the size of things in it, and with the length of the borders
            between its classes, each with the share of permutations that are as far from 0

Legend: N images, K exits, hb, wb places of an image, H, W its size, C classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from any_budget import rank_correlation
from routeseg.budgets.asked import Asked
from routeseg.budgets.budgeted import Budgeted
from routeseg.budgets.worth import price_between
from routeseg.cost.macs import model_cost, spent_macs
from routeseg.data.config import DataConfig, open_data
from routeseg.data.decoding import read_image
from routeseg.data.loaders import evaluation_loader
from routeseg.data.pairs import list_images
from routeseg.data.subset import evenly_spread
from routeseg.engine import SkipEngine
from routeseg.evaluation import machine_facts
from routeseg.evaluation.scores import count_pairs
from routeseg.files import write_json
from routeseg.labels import IGNORE
from routeseg.model import DynamicRoutingNetwork, Segmentation, checkpoints
from routeseg.model.decoder import most_likely
from routeseg.space import MIN_IMAGE_SIZE, Size
from routeseg.survey.route_statistics import object_size

PRICES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.22, 0.32, 0.45, 0.65, 0.9)  # nats
CLOSER = (0.03, 0.06, 0.1, 0.15, 0.22, 0.32, 0.45, 0.65)  # nats
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SHUFFLES = 5
ASKED = (0.35, 0.5, 0.75)
HALF = 0.5  # the budget of `follows`
KEPT_IMAGES = 40  # of each source
FRONTIER = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, 1.5, 2.0)


class Looked:
    """What every exit makes of an image: labels uint8 [K,H,W], entropies [K-1,hb,wb] of places, the truth [H,W]."""

    def __init__(self, model: DynamicRoutingNetwork, image: Tensor, truth: Tensor) -> None:
        assert model.exits is not None and model.config.place is not None
        result, kept = model.all_exits(image)
        outputs = (*result.earlier, result.logits)
        self.labels = np.stack([most_likely(one)[0].numpy().astype(np.uint8) for one in outputs])
        self.entropy = np.stack([model.exits.see(exit, maps)[0].numpy() for exit, maps in enumerate(kept)])
        self.truth, self.place = truth[0].numpy(), model.config.place
        table = model_cost(model, (image.shape[-2], image.shape[-1]))
        assert table.exits is not None
        self.costs = table.exits / table.full

    def composed(self, exits: np.ndarray) -> np.ndarray:
        """The labels [H,W] if places leave at these exits [hb,wb]."""
        height, width = self.truth.shape
        at = exits.repeat(self.place, 0).repeat(self.place, 1)[:height, :width]
        found: np.ndarray = np.take_along_axis(self.labels, at[None], 0)[0]
        return found

    def leave(self, entropy: np.ndarray, price: float) -> np.ndarray:
        """The exits [hb,wb] by entropies [K-1,hb,wb] and a price."""
        leaves = np.concatenate([entropy <= price, np.ones((1, *entropy.shape[1:]), bool)])
        first: np.ndarray = leaves.argmax(0)
        return first

    def errors(self, weights: np.ndarray) -> np.ndarray:
        """The wrong pixels of each place at each exit, each times the weight of its class: [K,hb,wb]."""
        known = self.truth < len(weights)
        weight = np.where(known, weights[np.where(known, self.truth, 0)], 0.0)
        wrong = torch.from_numpy((self.labels != self.truth) * weight)
        height, width = (side * self.place for side in self.entropy.shape[1:])
        padded = F.pad(wrong, (0, width - wrong.shape[-1], 0, height - wrong.shape[-2]))
        summed: np.ndarray = F.avg_pool2d(padded[None], self.place)[0].numpy() * self.place**2
        return summed


def miou(pairs: np.ndarray) -> float:
    """Of the confusion matrix [C,C], over the classes that labels have."""
    hits, there = np.diag(pairs), pairs.sum(1) > 0
    return float((hits[there] / (pairs.sum(0) + pairs.sum(1) - hits)[there]).mean())


def pairs_of(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    return count_pairs(torch.from_numpy(truth), torch.from_numpy(found.astype(np.int64)), classes).numpy()


def scored(looked: list[Looked], exits: list[np.ndarray], classes: int) -> float:
    return miou(sum(pairs_of(one.truth, one.composed(at), classes) for one, at in zip(looked, exits, strict=True)))


def spent(looked: list[Looked], exits: list[np.ndarray]) -> float:
    return float(np.mean([one.costs[at].mean() for one, at in zip(looked, exits, strict=True)]))


def at_cost(looked: list[Looked], exits: Callable[[Looked, float], np.ndarray], cost: float) -> list[np.ndarray]:
    """The exits that a rule gives at the price at which they cost so much."""
    _, price = price_between(lambda price: spent(looked, [exits(one, price) for one in looked]), cost)
    return [exits(one, price) for one in looked]


def chosen(looked: list[Looked], classes: int, budget: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    pixels = sum(np.bincount(one.truth[one.truth < classes], minlength=classes) for one in looked)
    weights = 1 / np.maximum(pixels, 1)
    errors = {id(one): one.errors(weights) for one in looked}

    def images(one: Looked, price: float) -> np.ndarray:
        mean = one.entropy.mean((1, 2), keepdims=True)
        return one.leave(np.broadcast_to(mean, one.entropy.shape), price)

    def oracle(one: Looked, price: float) -> np.ndarray:
        total: np.ndarray = (errors[id(one)] + price * one.costs[:, None, None]).argmin(0)
        return total

    own = at_cost(looked, lambda one, price: one.leave(one.entropy, price), budget)
    within = [
        scored(looked, [rng.permutation(at.ravel()).reshape(at.shape) for at in own], classes) for _ in range(SHUFFLES)
    ]
    fixed = [scored(looked, [np.full(at.shape, k) for at in own], classes) for k in range(len(looked[0].labels))]
    found = {
        "spent": spent(looked, own),
        "images": scored(looked, at_cost(looked, images, budget), classes),
        "places": scored(looked, own, classes),
        "shuffled": float(np.mean(within)),
        "common": float(np.interp(budget, np.mean([one.costs for one in looked], 0), fixed)),
        "oracle": scored(looked, at_cost(looked, oracle, budget), classes),
    }
    if len({at.shape for at in own}) == 1:  # maps of images of other sizes do not fit
        turns = [[own[i] for i in rng.permutation(len(own))] for _ in range(SHUFFLES)]
        found["exchanged"] = float(np.mean([scored(looked, some, classes) for some in turns]))
    return found


def resized(image: Tensor, size: float) -> Tensor:
    """An image uint8 [1,3,H,W] of another source: its sides times `size`."""
    sides = [max(MIN_IMAGE_SIZE, round(side * size)) for side in image.shape[-2:]]
    return F.interpolate(image.float() / 255, sides, mode="bilinear", antialias=True).clamp(0, 1)


class Counted:
    """A forward whose scores and costs are added up: shares of what `reference`, or else the model, costs with all
    layers at the images' own size."""

    def __init__(
        self, forward: Callable[..., Any], model: DynamicRoutingNetwork, reference: DynamicRoutingNetwork | None = None
    ) -> None:
        self.forward, self.model, self.pairs = forward, model, cast(Any, 0)
        self.reference = reference or model
        self.costs: list[float] = []

    def __call__(self, one: dict[str, Any], **how: Any) -> Any:
        image = one["image"]
        result, own = self.forward(image, **how), (image.shape[-2], image.shape[-1])
        if "labels" in one:
            found = most_likely(result.logits)[0].numpy()
            self.pairs = self.pairs + pairs_of(one["labels"][0].numpy(), found, self.model.config.num_classes)
        self.costs.append(spent_share(self.model, result, own, self.reference))
        return result


def spent_share(model: DynamicRoutingNetwork, result: Any, own: tuple[int, int], reference: Any = None) -> float:
    """The MACs of a result, as a share of what `reference`, or else the model, costs at this size with all layers."""
    macs = spent_macs(result, own, partial(model_cost, model))[0]
    return float(macs) / model_cost(reference or model, own).full


def walked(
    engine: SkipEngine[Segmentation],
    model: DynamicRoutingNetwork,
    images: list[Any],
    size: Size,
    price: float,
    reference: DynamicRoutingNetwork | None = None,
) -> dict[str, Any]:
    """Cost and score of images at a size: all layers (price 0, also without exits), or places at a price."""
    counted = Counted(engine, model, reference)
    asked = {} if model.exits is None else {"price": price}
    for one in images:
        counted(one, size=size, **asked)
    return {"size": size, "price": price, "cost": float(np.mean(counted.costs)), "miou": miou(counted.pairs)}


def frontier(
    engine: SkipEngine[Segmentation],
    model: DynamicRoutingNetwork,
    images: list[Any],
    asked: float,
    reference: DynamicRoutingNetwork | None = None,
) -> dict[str, Any]:
    """What a budget makes of the images: the size that it chooses, what is spent, the score."""
    budget = Asked.parse(f"{100 * asked:g}%")
    counted = Counted(Budgeted(engine, model, budget), model, reference)
    for one in images:
        counted(one)
    look = budget.look(model, (images[0]["image"].shape[-2], images[0]["image"].shape[-1]))
    return {"asked": asked, "size": look.size, "cost": float(np.mean(counted.costs)), "miou": miou(counted.pairs)}


def sources(images: list[dict[str, Any]], others: list[str]) -> dict[str, list[Tensor]]:
    """Images uint8 or in 0..1, [1,3,H,W], by what they are."""
    own = [one["image"] for one in images[:: max(1, len(images) // KEPT_IMAGES)]]
    rng = torch.Generator().manual_seed(0)

    def noisy(image: Tensor) -> Tensor:
        return (image / 255 + 0.1 * torch.randn(image.shape, generator=rng)).clamp(0, 1)

    found = {
        "the images": own,
        "half of the size": [resized(one, 0.5) for one in own],
        "twice the size": [resized(one, 2) for one in own],
        "darkened": [one / 255 * 0.4 for one in own],
        "blurred": [F.avg_pool2d(one / 255, 5, 1, 2) for one in own],
        "noisy": [noisy(one) for one in own],
    }
    for folder in others:
        paths = sorted(list_images(Path(folder), nested=True).values())
        some = paths[:: max(1, len(paths) // KEPT_IMAGES)]
        found["/".join(Path(folder).parts[-3:])] = [
            torch.from_numpy(read_image(one)).permute(2, 0, 1)[None] for one in some
        ]
    return found


def kept(
    engine: SkipEngine[Segmentation], model: DynamicRoutingNetwork, images: list[Tensor]
) -> dict[str, dict[str, float]]:
    """What is spent of each of ASKED."""
    found: dict[str, dict[str, float]] = {}
    for asked in ASKED:
        costs = {}
        for name, how in {"mean": {}, "fixed": {"fixed": True}, "per_image": {"per_image": True}}.items():
            counted = Counted(Budgeted(engine, model, replace(Asked.parse(asked), **cast(Any, how))), model)
            for image in images:
                counted({"image": image})
            costs[name] = counted.costs
        furthest = float(np.abs(np.array(costs["per_image"]) - asked).max())
        means = {name: float(np.mean(some)) for name, some in costs.items()}
        found[str(asked)] = means | {"per_image_furthest": furthest}
    return found


def follows(engine: SkipEngine[Segmentation], model: DynamicRoutingNetwork, images: list[Any]) -> dict[str, Any]:
    """Whether costs at half of the budget follow what is in the images, by their labels."""
    counted, rng = Counted(engine, model), np.random.default_rng(0)
    for one in images:
        counted(one, budget=HALF, size=1.0)
    labels = [one["labels"][0].numpy() for one in images]
    facts = {"size_of_things": [object_size(one) for one in labels], "borders": [border_length(one) for one in labels]}
    costs, found = np.array(counted.costs), {"costs": counted.costs}
    for name, values in facts.items():
        known = np.isfinite(values)
        correlation, chance = rank_correlation(np.array(values)[known], costs[known], rng)
        found[name] = {"correlation": correlation, "chance": chance, "of_images": values}
    return found


def border_length(labels: np.ndarray) -> float:
    """Neighbours of two classes, as a share of the pixels of a label map [H,W]."""
    pairs = ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1]))
    return float(sum(((a != b) & (a != IGNORE) & (b != IGNORE)).sum() for a, b in pairs) / labels.size)


def placed(model: DynamicRoutingNetwork, place: int) -> DynamicRoutingNetwork:
    """The network, whose places decide."""
    if model.config.place == place:
        return model.eval()
    network = DynamicRoutingNetwork(replace(model.config, place=place, choice="entropy"))
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("exits.gates")}
    network.load_state_dict(weights)
    return network.eval()


@torch.no_grad()
def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a checkpoint folder, or `bundled`")
    parser.add_argument("--place", type=int, default=32)
    parser.add_argument("--data.name", dest="name", default="folder")
    parser.add_argument("--data.root", dest="root", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=None, help="at most so many")
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.5, 0.7, 1.0, 1.4])
    parser.add_argument("--walked", type=float, nargs="*", default=[0.7, 1.0], help="sizes at which places are walked")
    parser.add_argument("--closer", nargs="*", default=[], help="a first and a closer size, such as 0.5,1")
    parser.add_argument("--others", nargs="*", default=[], help="folders of images of other sources")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(words)
    model = placed(checkpoints.load(None if args.network == "bundled" else args.network), args.place)
    data = evenly_spread(open_data(DataConfig(name=args.name, root=args.root), args.split), args.images)
    images = [one for one in evaluation_loader(data) if not one["skipped"]]
    classes = model.config.num_classes
    looked = [Looked(model, one["image"], one["labels"]) for one in images]
    exits = [
        {
            "cost": float(np.mean([one.costs[k] for one in looked])),
            "miou": scored(looked, everywhere(looked, k), classes),
        }
        for k in range(len(looked[0].labels))
    ]
    least = exits[0]["cost"]
    found: dict[str, Any] = {
        "network": args.network,
        "place": args.place,
        "data": args.name,
        "split": args.split,
        "images": len(images),
        "exits": exits,
        "chosen": {str(budget): chosen(looked, classes, budget) for budget in BUDGETS if budget > least},
    }
    engine = SkipEngine(model)
    found["sizes"] = [walked(engine, model, images, size, 0.0) for size in args.sizes]
    write_json(args.output, found | machine_facts())
    found["walked"] = [walked(engine, model, images, size, price) for size in args.walked for price in PRICES]
    write_json(args.output, found | machine_facts())
    pairs: list[Any] = [tuple(map(float, one.split(","))) for one in args.closer]
    found["closer"] = [walked(engine, model, images, pair, price) for pair in pairs for price in CLOSER]
    if model.exits is not None and model.exits.calibrated:
        assert model.prices is not None
        least, most = model.prices.least, max(1.0, *model.prices.singles.sizes) ** 2  # type: ignore[type-var]
        asked = [one for one in FRONTIER if least <= one <= most]
        found["frontier"] = [frontier(engine, model, images, one) for one in asked]
        write_json(args.output, found | machine_facts())
        found["follows"] = follows(engine, model, images)
        write_json(args.output, found | machine_facts())
        found["kept"] = {name: kept(engine, model, some) for name, some in sources(images, args.others).items()}
    write_json(args.output, found | {"command": ["benchmarks/places.py", *words]} | machine_facts())
    return 0


def everywhere(looked: list[Looked], exit: int) -> list[np.ndarray]:
    """All places of all images at one exit."""
    return [np.full(one.entropy.shape[1:], exit) for one in looked]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
