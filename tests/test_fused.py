"""The training step's own kernels against PyTorch's operations, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import spread_gates
from routeseg import DynamicRoutingNetwork
from routeseg.labels import IGNORE
from routeseg.model.compute import PLAIN
from routeseg.model.operations import SepConv3x3
from routeseg.space import DIRECTIONS
from routeseg.training import fused
from routeseg.training.batch_norm import precise_batch_norm
from routeseg.training.fused import Fused

pytestmark = pytest.mark.skipif(fused._library() is None, reason="there are no kernels for this machine")

SIZES = {
    "paper": {},
    "small gates": {"small_gate": True},
    "two operations": {"cell_operations": ("sep_conv_5x5", "identity", "sep_conv_3x3")},
    "no identity": {"cell_operations": ("sep_conv_3x3",)},
    "softmax": {"gate": "softmax"},
    "zeros arrive": {"zeros_arrive": True},
    "vectors of 8": {"base_channels": 24, "stem_channels": 24},
    "vectors of 4": {"base_channels": 12, "stem_channels": 4},
    "wide": {"base_channels": 48, "stem_channels": 32, "num_scales": 3},
}


def network(seed: int = 1, **options) -> DynamicRoutingNetwork:
    """A network whose gates close some paths of some images, with norms that are not at their start.

    Whether float32 is near float64 at all is a matter of the seed: a norm of few values divides by almost nothing.
    """
    torch.manual_seed(seed)
    given = {"num_classes": 5, "depth": 4, "base_channels": 16, "stem_channels": 16} | options
    model = spread_gates(DynamicRoutingNetwork(**given)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.Linear):  # of a gate
            nn.init.constant_(module.bias, 0.7)
    return model


def images(batch: int = 3, height: int = 96, width: int = 128) -> torch.Tensor:
    """Noise, of another grain in every image, so that their routes differ."""
    generator = torch.Generator().manual_seed(0)
    grains = [torch.rand(1, 3, height // 2**i + 1, width // 2**i + 1, generator=generator) for i in range(batch)]
    return torch.cat([F.interpolate(grain, (height, width)) * (1 - 0.3 * i) for i, grain in enumerate(grains)])


def step(model: nn.Module, batch: torch.Tensor, compute, **options) -> torch.Tensor:
    """The loss of a forward, with its gradients: of logits and gates, so that both must be right."""
    model.compute = compute
    torch.manual_seed(7)
    result = model(batch, **options)
    place = torch.arange(result.logits[0].numel()).view_as(result.logits[0])
    loss = (result.logits * torch.cos(place.to(batch.dtype))).mean() + 0.1 * result.gates.square().mean()
    loss = loss + F.cross_entropy(result.logits.flatten(2), (place[0] % 5).flatten().expand(len(batch), -1) % 3)
    loss.backward()
    return loss.detach()


def agree(model: nn.Module, batch: torch.Tensor, **options) -> None:
    """Loss, gradients and statistics of the kernels are as near to float64's as float rounding lets them."""
    exact, plain, ours = copy.deepcopy(model).double(), copy.deepcopy(model), copy.deepcopy(model)
    expected = step(exact, batch.double(), PLAIN, **options)
    step(plain, batch, PLAIN, **options)
    assert step(ours, batch, Fused(), **options).item() == pytest.approx(expected.item(), rel=1e-5)
    scale = torch.stack([p.grad.norm() for p in exact.parameters() if p.grad is not None]).norm()
    compared = 0
    for (name, right), theirs, own in zip(exact.named_parameters(), plain.parameters(), ours.parameters(), strict=True):
        assert (right.grad is None) == (own.grad is None), name
        if right.grad is None:
            continue
        compared += 1
        error, usual = ((grad.double() - right.grad).norm() for grad in (own.grad, theirs.grad))
        assert error <= 10 * usual + 1e-3 * right.grad.norm() + 2e-6 * scale, name
    assert compared > len(list(model.parameters())) / 4
    for (name, right), own in zip(exact.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(own.double(), right.double(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_gradients(size):
    agree(network(seed=2 if size == "wide" else 1, **SIZES[size]), images())


def test_some_paths_are_closed():
    """Else the test above would compare less than it says."""
    model = network()
    gates = model(images()).gates[:, model.space.legal]
    assert 0.1 < (gates > 0).float().mean() < 0.9
    assert ((gates > 0).any(0) & ~(gates > 0).all(0)).any(), "a path is open for some images alone"


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 224)], ids=str)
def test_sizes_of_images(size):
    """Down to a single pixel at the coarsest scale, and maps of odd sides in the stem."""
    agree(network(seed=103), images(4, *size))


def test_drop_path():
    """Drawn as PyTorch's operations draw it."""
    agree(network(cell_operations=("sep_conv_3x3", "identity", "sep_conv_5x5")), images(), drop_path=0.5)


def test_given_routes():
    model = network()
    whole = model.route
    some = type(whole)(whole.space, frozenset(edge for edge in whole.edges if edge[1] < 2 and edge[2] != 2))
    agree(model, images(2), route=[whole, some])
    agree(model, images(2), route=whole, activation="own")


def test_static_network():
    agree(network(gate="fixed"), images())


def test_frozen_norms():
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    agree(model, images())


def test_classifier():
    """Another head, which runs on PyTorch's operations."""
    torch.manual_seed(0)
    model = DynamicRoutingNetwork(head="classifier", num_classes=3, depth=3, base_channels=8, stem_channels=8).train()
    losses = []
    for compute in (PLAIN, Fused()):
        trial = copy.deepcopy(model)
        trial.compute = compute
        loss = F.cross_entropy(trial(images()).logits, torch.arange(3))
        loss.backward()
        losses.append((loss.detach(), trial.head.predictor.weight.grad))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_precise_statistics():
    """A mean over batches, without gradients."""
    found = []
    for compute in (PLAIN, Fused()):
        model = network()
        model.compute = compute
        precise_batch_norm(model, [{"image": images(2)}, {"image": images(3) ** 2}])
        found.append(model.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        model = network(base_channels=32)
        for name, value in [("z", fused.convolved(fused.Term(images()), model.stem[0]).map)]:
            found.append((name, value.detach().clone()))
        step(model, images(), Fused())
        found.append([p.grad for p in model.stem.parameters()])
    for one in (2, 4):
        assert torch.equal(found[one][1], found[0][1])
    for one in (3, 5):
        assert all(torch.equal(own, first) for own, first in zip(found[one], found[1], strict=True))


def test_what_it_does_not_know_runs_as_it_is(monkeypatch):
    """A norm, an operation and a transform of another type, in a network whose other parts run on the kernels."""

    class Doubled(SepConv3x3):
        def forward(self, features):
            return 2 * super().forward(features)

    model = network()
    node = model.node(1, 0)
    node.cell["sep_conv_3x3"] = Doubled(16)
    other = model.node(2, 1).transforms["keep"]
    other[0] = nn.LeakyReLU()
    model.node(0, 0).gate.squeeze[1] = nn.GroupNorm(2, 8)
    called = []
    call = fused._call
    monkeypatch.setattr(fused, "_call", lambda name, *rest, **named: (called.append(name), call(name, *rest, **named)))
    agree(model, images())
    assert {"unit", "sum", "mean"} <= set(called)


def test_hooks_are_called():
    """A part that has one runs on PyTorch's operations; without it, on the kernels again."""
    model, seen = network(), []
    step(model, images(), Fused())
    sent = DIRECTIONS[int(model(images()).gates[:, 0, 0].amax(0).argmax())]
    parts = [model.stem[0][1], model.node(0, 0).cell, model.node(0, 0).transforms[sent], model.head.merge[0]]
    handles = [part.register_forward_hook(lambda part, *_: seen.append(part)) for part in parts]
    agree(model, images())
    seen.clear()
    step(model, images(), Fused())
    assert seen == parts
    for handle in handles:
        handle.remove()
    step(model, images(), Fused())
    assert seen == parts


@pytest.mark.parametrize("case", ["eval", "autocast", "float64", "channels"])
def test_where_it_does_not_run(case, monkeypatch):
    monkeypatch.setattr(fused, "_call", lambda *_, **__: pytest.fail("the kernels were called"))
    model = network(base_channels=10 if case == "channels" else 16)
    model.compute = Fused()
    if case == "eval":
        model.eval()
    if case == "float64":
        model.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        model(images()).logits.mean().backward()


def test_images_that_need_a_gradient():
    model, batch = network(seed=2), images()
    grads = []
    for compute in (PLAIN, Fused()):
        asked = batch.clone().requires_grad_()
        step(model, asked, compute)
        grads.append(asked.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-2 * grads[0].abs().max().item())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("classes", "size", "image"),
    [(5, (6, 10), (24, 40)), (19, (40, 33), (157, 130)), (3, (1, 1), (4, 3)), (1, (16, 32), (64, 128))],
    ids=str,
)
def test_cross_entropy(classes, size, image, weighted):
    """Of scores that are large, unlabelled pixels, weights, a cut at the edge of the image, and several bands."""
    generator = torch.Generator().manual_seed(0)
    scores = 30 * torch.randn(2, classes, *size, generator=generator)
    labels = torch.randint(0, classes, (2, *image), generator=generator)
    labels[0, :2] = IGNORE
    weights = torch.rand(2, *image, generator=generator) if weighted else None
    found = []
    for compute, kind in ((PLAIN, torch.float64), (PLAIN, torch.float32), (Fused(), torch.float32)):
        asked = scores.to(kind, copy=True).requires_grad_()
        own = None if weights is None else weights.to(kind)
        loss = compute.cross_entropy_sum(asked, labels, own)
        (3 * loss).backward()
        found.append((loss.double().item(), asked.grad.double()))
    assert found[2][0] == pytest.approx(found[0][0], rel=1e-6)
    assert (found[2][1] - found[0][1]).abs().max() <= 2 * (found[1][1] - found[0][1]).abs().max() + 1e-6


@pytest.mark.parametrize("exits", [None, [0, 2]], ids=["one", "exits"])
@pytest.mark.parametrize("size", [(96, 128), (70, 90)], ids=str)
def test_the_loss_of_coarse_logits(size, exits):
    """A forward that is asked for it leaves logits at a quarter of the padded size, and their loss is the same."""
    model, batch = network(gate="fixed", exits=exits), images(2, *size)
    labels = torch.randint(0, 5, (2, *size))
    found = []
    for compute, kind in ((PLAIN, torch.float64), (Fused(), torch.float32)):
        trial = copy.deepcopy(model).to(kind)
        trial.compute = compute
        result = trial(batch.to(kind), coarse=True)
        outputs = (*result.earlier, result.logits)
        padded = [-(-side // 32) * 8 for side in size]
        assert all(list(one.shape[-2:]) == padded for one in outputs)
        loss = sum(compute.cross_entropy_sum(one, labels) for one in outputs)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.double().flatten() for p in trial.head.parameters()])))
        assert (
            trial(batch.to(kind)).logits.shape[-2:]
            == size
            == trial.eval()(batch.to(kind), coarse=True).logits.shape[-2:]
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-3 * found[0][1].abs().max().item())


def test_a_label_that_is_no_class():
    with pytest.raises(RuntimeError, match="a label is none of the classes"):
        Fused().cross_entropy_sum(torch.zeros(1, 3, 8, 8), torch.full((1, 32, 32), 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_of_what_is_not_finite(value):
    scores = torch.zeros(1, 3, 8, 8)
    scores[0, 1, 4, 4] = value
    assert Fused().cross_entropy_sum(scores, torch.zeros(1, 32, 32, dtype=torch.int64)).isnan()


def test_nan_is_not_hidden():
    model, batch = network(), images()
    batch[1, 2, 40, 40] = float("nan")
    model.compute = Fused()
    assert model(batch).logits.isnan().any()


def test_a_network_that_is_copied_or_pickled_keeps_its_way(tmp_path):
    model = network()
    model.compute = Fused()
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert isinstance(again.compute, Fused)


@pytest.mark.parametrize("structure", [fused._Unit, fused._Term, fused._Sum, fused._Mean, fused._Entropy])
def test_fields_that_lie_elsewhere_are_noticed(structure):
    fields = list(structure._fields_)
    fields[0], fields[1] = fields[1], fields[0]
    if structure is fused._Sum:
        fields = fields[:-1]
    other = type(structure.__name__, (fused.Structure,), {"_fields_": fields})
    swapped = [other if one is structure else one for one in fused.STRUCTURES]
    layout = fused._library().routeseg_training_layout
    assert fused.first_difference(layout(), fused.STRUCTURES) is None
    assert fused.first_difference(layout(), swapped).startswith(structure.__name__[1:])


def test_wrong_arguments_of_the_kernels():
    unit = fused._Unit(1, 8, 8, 16, 16, 7, 1, 0, 0, 0)
    with pytest.raises(RuntimeError, match="a unit has another kernel"):
        fused._call("unit", unit, False)
    with pytest.raises(RuntimeError, match="a sum has no terms"):
        fused._call("sum", fused._Sum(1, 8, 8, 16, 0), False)
    with pytest.raises(RuntimeError, match="a mean lacks memory"):
        fused._call("mean", fused._Mean(1, 8, 16), False)
    with pytest.raises(RuntimeError, match="a cross-entropy has no size"):
        fused._call("entropy", fused._Entropy(1, 3, 8, 8, 33, 32))
    with pytest.raises(RuntimeError, match="a cross-entropy lacks memory"):
        fused._call("entropy", fused._Entropy(1, 3, 8, 8, 32, 32))
