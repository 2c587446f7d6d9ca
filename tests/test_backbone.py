"""Networks on a pretrained backbone."""

import importlib.util
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import run, spread_gates
from routeseg import DynamicRoutingNetwork, Route, SkipEngine, load, model_cost
from routeseg.config import NetworkConfig
from routeseg.counting import CONVENTIONS, PartMacs
from routeseg.data.config import DataConfig
from routeseg.engine.compiled import CompiledForward, is_compiled
from routeseg.export import build_onnx
from routeseg.model.backbone import Backbone, InvertedResidual
from routeseg.space import DOWN
from routeseg.training.batch_norm import images_of_norms, norms_of
from routeseg.training.gate_budget import Budget
from routeseg.training.recipe import Recipe
from routeseg.training.run import RunOptions
from routeseg.training.segmentation import SegmentationTask, train

SIZE = (64, 96)
NETWORK = {"num_classes": 5, "depth": 4, "base_channels": 8, "backbone": "efficientnet_lite0"}
NO_STAGE_BUT_THE_FIRST = [[layer, 0, "keep"] for layer in range(5)]
FEATURES = {
    0: [
        (0.44468, 11.38363, -2.32314, 11.66937),
        (0.16824, 10.30011, -13.04395, -2.90865),
        (0.32956, 6.05744, 1.67152, 3.03812),
        (-0.19239, 2.59584, -5.18553, 0.32836),
    ],
    1: [
        (4.53461, 13.30343, 8.28147, -5.89112),
        (0.39975, 13.41467, 6.21653, 3.57809),
        (-0.25072, 6.08061, 2.89054, 6.5666),
        (-0.18506, 3.19268, -0.22773, -0.54561),
    ],
    2: [
        (-1.18765, 13.46164, -24.87822, 16.33481),
        (1.01294, 12.0786, 9.40206, 4.95667),
        (-0.14833, 6.39608, -2.73004, -10.09021),
        (0.14774, 2.65172, 1.99178, -3.72201),
    ],
}
needs_kernels = pytest.mark.skipif(not is_compiled(torch.float32), reason="there are no kernels here")


def network(**options) -> DynamicRoutingNetwork:
    torch.manual_seed(0)
    model = spread_gates(DynamicRoutingNetwork(**NETWORK | options)).eval()
    with torch.no_grad():
        for block in model.modules():  # random weights would let the maps of a backbone grow from block to block
            if isinstance(block, InvertedResidual):
                block.project[-1].weight.mul_(0.3)
    return model


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def stages_that_ran(model: DynamicRoutingNetwork, *args) -> list[int]:
    """How many images each stage of the backbone computes."""
    counts = [0] * len(model.backbone.stages)

    def hook(number):
        return lambda _, inputs, out: counts.__setitem__(number, counts[number] + len(inputs[0]))

    handles = [stage.register_forward_hook(hook(s)) for s, stage in enumerate(model.backbone.stages)]
    with torch.no_grad():
        model(*args)
    for handle in handles:
        handle.remove()
    return counts


class TestWeights:
    @pytest.mark.parametrize(("version", "expected"), FEATURES.items())
    def test_features_are_those_of_another_implementation(self, version, expected):
        """Of the same file, read by the package efficientnet-lite-pytorch 0.1.0, padded for this size: mean, deviation
        and two values of each stage."""
        model = DynamicRoutingNetwork(**NETWORK | {"backbone": f"efficientnet_lite{version}"}).eval()
        model.load_pretrained()
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
        features = torch.stack([torch.sin(x / 7 + c) * torch.cos(y / 5 - c) for c in range(3)])[None]
        for stage, numbers, channels in zip(model.backbone.stages, expected, model.backbone.channels, strict=True):
            with torch.no_grad():
                features = stage(features)
            found = (features.mean(), features.std(), features[0, 3, 1, 2], features[0, -1, -1, -1])
            assert features.shape[1] == channels
            assert [value.item() for value in found] == pytest.approx(numbers, abs=2e-4)

    @needs_kernels
    @pytest.mark.parametrize("version", FEATURES)
    def test_a_member_of_the_family_is_its_table_alone(self, version):
        """Cost, kernels, and files that run elsewhere come with it."""
        model = network(gate="fixed", route="diagonal", backbone=f"efficientnet_lite{version}")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            expected = model(images(1))
        macs = model_cost(model, SIZE, "conv").full
        assert counter.get_total_flops() / 2 == macs
        engine = SkipEngine(model, backend="kernels")
        assert torch.allclose(engine(images(1)).logits, expected.logits, atol=1e-3 * float(expected.logits.abs().max()))
        session = onnxruntime.InferenceSession(build_onnx(model).SerializeToString())
        found = session.run(None, {"images": images(1).numpy()})[0]
        assert np.allclose(found, expected.logits, atol=1e-3 * float(expected.logits.abs().max()))

    def test_the_network_takes_the_normalisation_of_the_weights(self):
        model = DynamicRoutingNetwork(**NETWORK)
        model.load_pretrained()
        assert model.config.pixel_mean == pytest.approx((127 / 255,) * 3)
        assert model.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()[0] == pytest.approx(1.0)

    def test_without_the_package_the_remedy_is_told(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
        words = [f"--model.{key}={value}" for key, value in NETWORK.items() if key != "num_classes"]
        code, _, err = run(["train", *words, "--data.train_images=2", f"--output={tmp_path}/run"], capsys)
        assert code == 2 and "pip install" in err and '[pretrained]"' in err

    def test_a_network_without_a_backbone(self):
        with pytest.raises(ValueError, match="no backbone"):
            DynamicRoutingNetwork(depth=3, base_channels=8).load_pretrained()


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"backbone": "resnet"}, "choose one of efficientnet_lite0"),
            ({"backbone": 3}, "backbone is 3"),
            ({"backbone": "efficientnet_lite0", "zeros_arrive": True}, "zeros_arrive"),
        ],
    )
    def test_mistakes(self, fields, words):
        with pytest.raises(ValueError, match=words):
            NetworkConfig(**fields)

    def test_more_scales_than_the_backbone_has(self):
        with pytest.raises(ValueError, match="has 4 scales"):
            DynamicRoutingNetwork(**NETWORK | {"num_scales": 5, "depth": 5})

    def test_only_the_stages_of_the_route_are_there(self):
        model = network(gate="fixed", route=NO_STAGE_BUT_THE_FIRST)
        assert len(model.backbone.stages) == 1
        assert len(network().backbone.stages) == 4

    def test_saved_and_loaded(self, tmp_path):
        model = network(gate="fixed", route="diagonal")
        again = load(model.save(tmp_path))
        assert again.config == model.config and torch.equal(again(images()).logits, model(images()).logits)


class TestForward:
    def test_a_stage_runs_only_if_a_path_leads_to_it(self):
        model = network(gate="fixed")
        whole = model.route
        fine = Route(whole.space, [edge for edge in whole if edge[1] == 0 and edge[2] == 1])
        half = Route(whole.space, [edge for edge in whole if edge != (1, 1, DOWN)]).pruned()
        assert stages_that_ran(model, images(1), whole) == [1, 1, 1, 1]
        assert stages_that_ran(model, images(1), fine) == [1, 0, 0, 0]
        assert stages_that_ran(model, images(3), [whole, half, fine]) == [3, 2, 1, 1]

    def test_images_do_not_depend_on_each_other(self):
        model, batch = network(), images()
        together = model(batch)
        assert len({tuple(gates.flatten().tolist()) for gates in together.gates}) > 1, "routes should differ"
        for number, image in enumerate(batch):
            alone = model(image[None])
            torch.testing.assert_close(alone.logits[0], together.logits[number], rtol=1e-3, atol=1e-3)

    def test_a_closing_gate_takes_the_stage_along(self):
        """What a stage sends is weighted as the path beside it, so that nothing jumps where a gate closes."""
        model = network()
        node = model.node(0, 0)
        with torch.no_grad():
            node.gate.score.weight.zero_()
            outputs = []
            for score in (0.0, 1e-5):
                node.gate.score.bias[:] = torch.tensor([1.0, score])  # keep, down
                outputs.append(model(images()).logits)
        assert stages_that_ran(model, images()) == [4, 4, *stages_that_ran(model, images())[2:]]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("backend", [pytest.param("kernels", marks=needs_kernels), "eager"])
    @pytest.mark.parametrize("options", [{}, {"gate": "fixed", "route": "diagonal"}, {"base_channels": 24}])
    def test_engines_agree(self, backend, options):
        model, batch = network(**options), torch.rand(3, 3, 75, 101)
        expected, found = model(batch), SkipEngine(model, backend=backend)(batch)
        assert torch.equal(expected.gates > 0, found.gates > 0)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)

    @needs_kernels
    def test_the_kernels_know_it(self):
        assert CompiledForward.supports(network(), torch.float32) is None

    @needs_kernels
    def test_exits(self):
        model = network(gate="fixed", route="diagonal", exits=[0, 1, 2])
        engine = SkipEngine(model)
        for route in model.config.exit_routes:
            torch.testing.assert_close(
                engine(images(), route).logits, model(images(), route).logits, rtol=1e-3, atol=1e-3
            )


class TestCost:
    @pytest.mark.parametrize("options", [{"gate": "fixed"}, {"gate": "fixed", "route": NO_STAGE_BUT_THE_FIRST}])
    def test_convolutions_as_pytorch_counts_them(self, options):
        model = network(**options)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(1))
        assert model_cost(model, SIZE, "conv").full == counter.get_total_flops() / 2

    def test_a_route_that_stays_fine_does_not_pay_for_the_stages(self):
        model = network(gate="fixed")
        table, without = model_cost(model, SIZE), model_cost(replace(model.config, backbone=None), SIZE)
        stages = [part.count(SIZE, CONVENTIONS["authors"]) for part in model.macs.stages]
        difference = table.edge - without.edge
        assert len(stages) == 3 and [difference[s, s, DOWN] for s in range(3)] == pytest.approx(stages)
        assert np.count_nonzero(difference) == 3

    def test_costs_travel_as_json(self):
        macs = network().macs
        assert PartMacs.from_json(macs.as_json(), 4) == macs


class TestTraining:
    RECIPE = Recipe(iterations=4, lr=0.05, warmup_steps=1, precise_bn_batches=1, validate_every=4, save_every=4)

    def task(self, **options) -> SegmentationTask:
        model = network(gate="fixed", route="diagonal")
        return SegmentationTask(model, replace(self.RECIPE, **options), Budget(), SIZE)

    def test_statistics_of_the_backbone_stay(self):
        model = network(gate="fixed", route="diagonal")
        before = {name: value.clone() for name, value in model.backbone.stages.named_buffers()}
        model.train()
        model(images())
        assert all(torch.equal(value, before[name]) for name, value in model.backbone.stages.named_buffers())
        assert model.backbone.project[0][1].training

    def test_frozen_then_free(self, tmp_path):
        """The stages do not move while they are frozen, and do afterwards; the first not at all."""
        data = DataConfig(image_size=SIZE, crop=SIZE, train_images=4, val_images=1, batch_size=2, workers=0, seed=0)
        for frozen, moves in ((1.0, False), (0.5, True)):
            model = network(num_classes=10, gate="fixed", route="diagonal")
            before = {name: value.clone() for name, value in model.backbone.stages.named_parameters()}
            recipe = replace(self.RECIPE, backbone_frozen=frozen)
            train(model, data, recipe, Budget(), RunOptions(tmp_path / str(frozen), progress=False))
            after = dict(model.backbone.stages.named_parameters())
            moved = {name[0] for name, value in before.items() if not torch.equal(after[name], value)}
            assert moved == (set("123") if moves else set())

    def test_learning_rates(self):
        groups = self.task(backbone_lr_factor=0.1).configure_optimizers()["optimizer"].param_groups
        assert sorted({group["initial_lr"] for group in groups}) == pytest.approx([0.005, 0.05])

    def test_norms_count_the_images_that_they_saw(self):
        model = network(gate="fixed")
        whole = model.route
        fine = Route(whole.space, [edge for edge in whole if edge[1] == 0 and edge[2] == 1])
        gates = torch.from_numpy(np.stack([whole.to_gates(), fine.to_gates()]))
        counts = dict(zip(map(id, norms_of(model)), images_of_norms(model, gates).tolist(), strict=True))
        assert [counts[id(project[1])] for project in model.backbone.project] == [2, 1, 1, 1]

    @pytest.mark.parametrize(
        ("field", "value"), [("backbone_lr_factor", 0.0), ("backbone_frozen", 1.5), ("backbone_frozen_stages", -1)]
    )
    def test_mistakes(self, field, value):
        with pytest.raises(ValueError, match=field):
            Recipe(**{field: value})


class TestExport:
    def test_static(self):
        model = network(gate="fixed", route="diagonal")
        session = onnxruntime.InferenceSession(build_onnx(model).SerializeToString())
        logits, gates = session.run(None, {"images": images(2).numpy()})
        expected = model(images(2))
        np.testing.assert_allclose(logits, expected.logits.detach(), rtol=1e-3, atol=1e-3)
        assert np.array_equal(gates, expected.gates)

    def test_gates_and_a_backbone_are_refused(self):
        with pytest.raises(ValueError, match="no file holds a network with gates and a backbone: name one route"):
            build_onnx(network())

    def test_a_backbone_without_an_export(self):
        with pytest.raises(ValueError, match="give it a method `onnx`"):
            Backbone.onnx(network().backbone, None, 0, "x")
