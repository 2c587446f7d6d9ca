"""Parity with the authors' network: what it computed, for three networks in its checkpoint format (tests/golden)."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import routeseg
from conftest import GOLDEN, authors_report
from routeseg.cost.macs import model_cost
from routeseg.engine import SkipEngine
from routeseg.space import DOWN, KEEP, UP
from routeseg.training.gate_budget import budget_loss

NAMES = ("tiny_open", "tiny_mixed", "tiny_small_gate")


@pytest.fixture(params=NAMES)
def golden(request):
    """(model, values, facts): the imported network, the authors' tensors, the authors' figures."""
    facts = json.loads((GOLDEN / f"{request.param}.json").read_text())
    values = load_file(GOLDEN / f"{request.param}.io.safetensors")
    model = routeseg.import_checkpoint(
        GOLDEN / f"{request.param}.weights.safetensors", small_gate=facts["small_gate"], normalize=False
    )
    return model, values, facts


def authors_table(model, facts):
    return authors_report(model_cost(model, tuple(facts["image_size"])))


@pytest.mark.parametrize("engine", ["network", "kernels", "eager"])
def test_logits_and_gates(golden, engine):
    model, values, _ = golden
    with torch.no_grad():
        result = (model.eval() if engine == "network" else SkipEngine(model, backend=engine))(values["input"])
    error = (result.logits - values["logits"]).abs().max() / values["logits"].abs().max()
    assert error < 1e-5
    reached = model.space.reached(result.gates.numpy(), model.config.zeros_arrive)
    for key, expected in values.items():
        if not key.startswith("gates/"):
            continue
        name = key.removeprefix("gates/")
        layer, scale = (0, 0) if name == "init_layer" else (int(name.split(".")[0]) + 1, int(name.split(".")[1]))
        order = [d for d in (KEEP, UP, DOWN) if d in model.space.directions(layer, scale)]
        ours = result.gates[:, layer, scale][:, order]
        assert torch.allclose(ours, expected.clamp(min=0), atol=1e-5), key
        assert (reached[:, layer, scale] == (expected >= 0).all(1).numpy()).all(), key


def test_counts(golden):
    model, values, facts = golden
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    assert model.space.depth == facts["layer_num"]
    assert model.config.base_channels == facts["init_channel"]
    table = authors_table(model, facts)
    assert table.stem == pytest.approx(facts["stem_mflops"] * 1e6, rel=1e-6)
    assert table.head == pytest.approx(facts["head_mflops"] * 1e6, rel=1e-6)
    with torch.no_grad():
        gates = model(values["input"]).gates
    assert table.of_gates(gates) == pytest.approx([c * 1e6 for c in facts["eval_real_mflops"]], rel=1e-3)
    assert table.expected(gates).tolist() == pytest.approx([c * 1e6 for c in facts["eval_expected_mflops"]], rel=1e-3)


def test_training_mode(golden):
    model, values, facts = golden
    expected = facts["train"]
    model.train()
    result = model(values["input"])
    cross_entropy = F.cross_entropy(result.logits, values["target"], ignore_index=255)
    assert cross_entropy.item() == pytest.approx(expected["cross_entropy"], rel=1e-5)
    cost = authors_table(model, facts).expected(result.gates)
    assert cost.mean().item() == pytest.approx(expected["expected_mflops"] * 1e6, rel=1e-4)
    budget = expected["budget"]
    loss = budget["weight"] * budget_loss(cost, budget["flops_all"] * 1e6, budget["mu"])
    assert loss.item() == pytest.approx(budget["loss"], rel=1e-4)
    (cross_entropy + loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    # Float32 noise of a BatchNorm over three nearly equal values (1x1 maps) is amplified in the gradient.
    assert norm.item() == pytest.approx(expected["grad_norm_total"], rel=2e-3)


def test_normalisation_is_folded_in():
    """RGB in 0..1 through the folded network is BGR in 0..255, less the mean, through the bare one."""
    path = GOLDEN / "tiny_open.weights.safetensors"
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    theirs = images.flip(1).float() - torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = routeseg.import_checkpoint(path, normalize=False)(theirs).logits
        folded = routeseg.import_checkpoint(path)
        for given in (images, images / 255.0):
            assert torch.allclose(folded(given).logits, expected, atol=1e-3 * expected.abs().max().item())


def test_pth_as_released(tmp_path):
    """A released file is a pickled dict with the state dict under "model"; other entries do not disturb."""
    state = load_file(GOLDEN / "tiny_mixed.weights.safetensors")
    path = tmp_path / "model_final.pth"
    torch.save({"model": state, "iteration": 190_000, "optimizer": {"state": {}}}, path)
    model = routeseg.import_checkpoint(path)
    folder = model.save(tmp_path / "out")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(routeseg.load(folder)(images).logits, model(images).logits)


def test_without_gates():
    state = load_file(GOLDEN / "tiny_open.weights.safetensors")
    model = routeseg.import_checkpoint({k: v for k, v in state.items() if ".gate_conv_beta." not in k})
    assert not model.config.gated
    assert (model(torch.rand(1, 3, 64, 64)).gates[0].detach().numpy() == model.space.legal).all()


class Evil:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "kind", ["truncated", "text", "code", "other network", "missing tensor", "extra tensor", "empty"]
)
def test_bad_files_are_refused(tmp_path, kind, capsys):
    from routeseg.cli import main

    state = load_file(GOLDEN / "tiny_open.weights.safetensors")
    path, trap, out = tmp_path / "bad.pth", tmp_path / "trap", tmp_path / "out"
    if kind == "truncated":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model": state, "x": Evil(trap)}))
    elif kind == "other network":
        torch.save({"model": torch.nn.Linear(3, 3).state_dict()}, path)
    elif kind == "missing tensor":
        torch.save(
            {"model": {k: v for k, v in state.items() if k != "backbone.all_cell_list.2.1.res_up.1.weight"}}, path
        )
    elif kind == "extra tensor":
        torch.save({"model": {**state, "backbone.extra": torch.zeros(1)}}, path)
    assert main(["import-checkpoint", str(path), str(out)]) == 2
    message = capsys.readouterr().err
    assert "bad.pth" in message and "Traceback" not in message
    assert not out.exists() and not trap.exists()


def test_code_in_a_zip_checkpoint_is_not_run(tmp_path):
    path, trap = tmp_path / "evil.pth", tmp_path / "trap"
    torch.save({"model": {"x": torch.zeros(1)}}, path)
    with zipfile.ZipFile(path) as original:
        entries = {name: original.read(name) for name in original.namelist()}
    with zipfile.ZipFile(path, "w") as evil:
        for name, content in entries.items():
            evil.writestr(name, pickle.dumps(Evil(trap)) if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match=r"evil\.pth"):
        routeseg.import_checkpoint(path)
    assert not trap.exists()
