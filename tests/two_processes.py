"""What two processes do for test_distributed.py: `torchrun --nproc_per_node 2 tests/two_processes.py FOLDER [WORDS]`.

At last they run `routeseg WORDS`, so that one of them can be killed in it.
"""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.nn.functional as collectives
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import routeseg.cli
from conftest import spread_gates
from routeseg import bfloat16, stopwatch
from routeseg.collectives import rank_and_world
from routeseg.cost.macs import model_cost
from routeseg.data.config import DataConfig
from routeseg.data.loaders import TRAIN_STREAM, TrainingImages, image_tensor
from routeseg.data.scenes import draw_scene
from routeseg.engine import SkipEngine
from routeseg.evaluation import evaluate
from routeseg.evaluation.test_time import MultiPass
from routeseg.model.compute import PLAIN
from routeseg.model.grid import RoutedNetwork
from routeseg.training import trial
from routeseg.training.batch_norm import precise_batch_norm
from routeseg.training.callbacks import ValidateAndSave
from routeseg.training.gate_budget import Budget, budget_loss
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import train

GLOBAL_BATCH, STEPS, CUT, PICTURES = 4, 8, 4, 5
DATA = dict(crop=(32, 64), image_size=(48, 64), train_images=10, val_images=5, workers=0)
SIZE = (48, 64)


def network(depth=3):
    torch.manual_seed(1)
    options = dict(depth=depth, base_channels=4, stem_channels=4)
    return spread_gates(routeseg.DynamicRoutingNetwork(num_classes=10, **options)).train()


def fit(output, batch_size, budget=0.5, resume=False, **changes):
    """A training; its checkpoint at step CUT is kept as cut.ckpt. Returns the result, (position, index) of what it
    read, and the network."""
    values = dict(
        iterations=STEPS, lr=0.05, warmup_steps=2, batch_norm="frozen", validate_every=STEPS, save_every=CUT,
        precise_bn_batches=3, log_every=1, precision="32-true", seed=3,
    )  # fmt: skip
    model, options = network(), RunOptions(output, resume, accelerator="cpu", progress=False)
    read, save, item = [], ValidateAndSave._save, TrainingImages.__getitem__

    def save_and_keep(self, trainer, task):
        save(self, trainer, task)
        if trainer.global_step == CUT and trainer.is_global_zero:
            shutil.copy(self.output / "last.ckpt", self.output / "cut.ckpt")

    def read_and_note(self, key):
        if self.stream == TRAIN_STREAM:
            read.append(key)
        return item(self, key)

    ValidateAndSave._save, TrainingImages.__getitem__ = save_and_keep, read_and_note
    try:
        result = train(
            model, DataConfig(**DATA, batch_size=batch_size), Recipe(**{**values, **changes}),
            Budget(budget, 0.2, start=0.2, ramp=0.2), options,
        )  # fmt: skip
    finally:
        ValidateAndSave._save, TrainingImages.__getitem__ = save, item
    return result, read, model


@contextmanager
def nodes_that_run():
    """A list with the set of nodes that run, for each forward in training."""
    ran, walk = [], RoutedNetwork.walk

    def note_walk(self, *args, **options):
        if not self.training:
            return walk(self, *args, **options)
        ran.append(set())
        hooks = [
            node.cell.register_forward_pre_hook(lambda *_, name=name: ran[-1].add(name))
            for name, node in self.nodes.items()
        ]
        try:
            return walk(self, *args, **options)
        finally:
            for hook in hooks:
                hook.remove()

    with mock.patch.object(RoutedNetwork, "walk", note_walk):
        yield ran


def images_and_labels(count=4):
    """Images of which some open a path and others do not."""
    generator = torch.Generator().manual_seed(5)
    level = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    images = (torch.rand(count, 3, *SIZE, generator=generator) * level + (1 - level) / 2).clamp(0, 1)
    labels = torch.randint(0, 10, (count, *SIZE), generator=generator)
    labels[0, :30] = 255  # so that the processes have different numbers of labelled pixels
    return images, labels


class NormOverProcesses(nn.BatchNorm2d):
    """What torch's SyncBatchNorm computes, in plain words, and also on CPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        sums = torch.stack((x.sum((0, 2, 3)), (x * x).sum((0, 2, 3)), x.new_full((x.shape[1],), x[:, 0].numel())))
        if rank_and_world()[1] > 1:
            sums = collectives.all_reduce(sums)
        mean = sums[0] / sums[2]
        var = sums[1] / sums[2] - mean**2
        x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def synced_gradients(part):
    """The nodes that ran, and the gradients of a step with BatchNorm over all processes, of this share of images."""
    model = network(depth=5).double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = NormOverProcesses(child.num_features).double()
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    ran = []
    for name, node in model.nodes.items():
        node.cell.register_forward_hook(lambda *_, name=name: ran.append(name))
    images, labels = images_and_labels()
    table, (_, world) = model_cost(model, SIZE), rank_and_world()
    labelled = (labels != 255).sum()
    several = (
        DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False) if world > 1 else model
    )
    with mock.patch.object(RoutedNetwork, "synced", True):  # as with SyncBatchNorm, which needs GPUs
        result = several(images[part].double())
    loss = world * PLAIN.cross_entropy_sum(result.logits, labels[part]) / labelled
    own = table.expected(result.gates).mean()
    mean = own.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(mean)
    loss = loss + budget_loss(own + (mean / world - own.detach()), table.budgeted, 0.2)
    loss.backward()
    return ran, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def statistics(batches):
    """BatchNorm's statistics estimated from these batches of one image."""
    model = network(depth=5)
    images, _ = images_and_labels()
    precise_batch_norm(model, [{"image": images[i : i + 1]} for i in batches])
    return {name: value for name, value in model.state_dict().items() if "running" in name}


def evaluation(model, rank=0, world=1):
    """What an evaluation finds out, in two passes over images of different sizes, and so of different costs."""
    examples = []
    for index in range(rank, PICTURES, world):
        image, labels = draw_scene(0, index, (48 + 16 * index, 64), "mixed")
        image, labels = image_tensor(image)[None], torch.from_numpy(labels.astype("int64"))[None]
        examples.append({"image": image, "labels": labels, "name": str(index), "skipped": 0})
    found = evaluate(model, examples, MultiPass(SkipEngine(model), [0.75, 1.0]), boundary_width=0.02)
    names = ("confusion", "boundary", "cost_macs", "gates", "passes")
    return json.loads(json.dumps(found.as_dict() | {name: getattr(found, name).tolist() for name in names}))


def fit_as_on_two_machines(output, rank):
    """A training whose precision is the machines' choice; in bfloat16 the first is the faster one, the second not."""
    step, now = trial._step, [0.0]

    def timed_step(task, batch, optimizer, precision):
        step(task, batch, optimizer, precision)
        now[0] += 1.0 if (precision == "bf16-mixed") == (rank == 0) else 2.0

    with (
        mock.patch.object(trial, "_step", timed_step),
        mock.patch.object(stopwatch, "clock", lambda: now[0]),
        mock.patch.object(bfloat16, "product_ratio", lambda: (0.5, 430.0)[rank]),
    ):
        return fit(output, GLOBAL_BATCH // 2, precision="auto", precise_bn_batches=0, iterations=CUT)


def main(folder, words):
    (folder / "resumed_one_two").mkdir(exist_ok=True)
    shutil.copy(folder / "one" / "cut.ckpt", folder / "resumed_one_two" / "last.ckpt")
    whole, read, _ = fit(folder / "two", GLOBAL_BATCH // 2)
    rank, world = rank_and_world()
    assert world == 2
    resumed, _, _ = fit(folder / "resumed_one_two", GLOBAL_BATCH // 2, resume=True)
    with nodes_that_run() as ran:
        fit(folder / "two_accumulated", 1, budget=0.0, accumulate=2)
    only_first = sum(bool(first - last) for first, last in zip(ran[::2], ran[1::2], strict=True))
    _, _, own = fit(
        folder / "two_own", GLOBAL_BATCH // 2, batch_norm="own", ema_decay=0.5, precise_bn_batches=0, iterations=CUT
    )
    own_state = own.state_dict()
    chosen, _, _ = fit_as_on_two_machines(folder / "two_auto", rank)
    model = routeseg.load(folder / "one" / "last")
    ran, gradients = synced_gradients(slice(rank * 2, rank * 2 + 2))
    tensors = {"ran": ran, "gradients": gradients, "statistics": statistics([rank, rank + 2]), "own": own_state}
    torch.save(tensors, folder / f"{rank}.pt")
    facts = {
        "read": read,
        "miou": {"whole": whole.found.miou, "resumed": resumed.found.miou},
        "evaluation": evaluation(model, rank, world),
        "only_first": only_first,
        "precision": chosen.precision,
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    return routeseg.cli.main(words)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
