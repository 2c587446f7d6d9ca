"""Networks and images that several tests need."""

import os
import shutil
import threading
from dataclasses import replace
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # beside other work, too: read when torch is imported
import torch  # noqa: E402

import routeseg
from downloads import serve
from routeseg import DynamicRoutingNetwork, bfloat16
from routeseg.cli import main
from routeseg.cost.macs import CostTable, exit_costs
from routeseg.data.config import DataConfig
from routeseg.data.scenes import CLASSES, PALETTE
from routeseg.data.tools.layouts import write_layout
from routeseg.engine import skip

GOLDEN = Path(__file__).parent / "golden"
CAMVID = Path(os.environ.get("ROUTESEG_CAMVID") or Path(__file__).parents[2] / "shared" / "camvid")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """Whatever this machine is fast in, precision `auto` is float32: tests compare numbers, and measure nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "product_ratio", lambda: 1.0)
        patch.setattr(skip, "kernels_ms", lambda: (1.0, 1.0))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """More only slow such small networks down, and other processes that run tests."""
    torch.set_num_threads(1)


@pytest.fixture
def no_report(monkeypatch):
    """The command `train` draws none: that takes longer than some steps of a small network."""
    monkeypatch.setattr("routeseg.training.report.write_report", lambda *_: None)


@pytest.fixture
def tiny_network():
    """Depth 4, 8 channels, 5 classes, gates spread out so that routes differ between images; eval mode."""
    return spread_gates(DynamicRoutingNetwork(num_classes=5, depth=4, base_channels=8, stem_channels=8)).eval()


def spread_gates(model: DynamicRoutingNetwork, seed: int = 0) -> DynamicRoutingNetwork:
    """Random statistics, and gates that depend on the image and are closed about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        for node in model.nodes.values():
            if node.gate is not None:
                node.gate.score.weight.copy_(torch.randn(node.gate.score.weight.shape, generator=generator) * 2)
                node.gate.score.bias.zero_()
    return model


@torch.no_grad()
def with_exits(size: tuple[int, int], **options) -> DynamicRoutingNetwork:
    """A network with exits that was not trained, calibrated for this size; images leave it at different ones, and have
    several classes."""
    torch.manual_seed(0)
    options = {"num_classes": 5, "depth": 6, "route": "diagonal", "exits": [0, 2, 4]} | options
    model = spread_gates(routeseg.Segmenter(base_channels=8, stem_channels=8, gate="fixed", **options)).eval()
    exits, costs = model.exits, exit_costs(model, size)
    losses = np.array((0.9, 0.5, 0.2, 0.0))[-len(costs) :]  # that images expect at the exits, about
    costs, prices = costs / costs[-1], np.linspace(0, 4, len(exits.prices))
    leaving = np.argmin(losses + prices[:, None] * costs, axis=1)
    exits.costs.copy_(torch.from_numpy(costs))
    exits.prices.copy_(torch.from_numpy(prices))
    exits.frequencies.copy_(torch.nn.functional.one_hot(torch.from_numpy(leaving), len(costs)))
    images, heads = torch.rand(8, 3, *size) * torch.rand(8, 3, 1, 1), [*exits.decoders, model.decoder]
    for head in heads:
        head.predictor.weight.mul_(30)
    result, features = model.all_exits(images)
    for head, logits in zip(heads, (*result.earlier, result.logits), strict=True):
        head.predictor.bias.copy_(-logits.mean((0, 2, 3)))
    for number, gate in enumerate(exits.gates):
        seen = exits.see(number, features[number])
        gate.center.copy_(seen.mean(0))
        gate.bias.copy_(torch.from_numpy(losses[number:]))
        gate.weight.normal_(std=0.1).div_(seen.std(0) + 1e-3)
    return model


def authors_report(cost: CostTable) -> CostTable:
    """What the authors' own counter leaves out set to 0: cell and gate of node (0,0), keep of the last layer."""
    gate, cell, edge = cost.gate.copy(), cost.cell.copy(), cost.edge.copy()
    gate[0, 0] = cell[0, 0] = edge[-1] = 0.0
    return replace(cost, gate=gate, cell=cell, edge=edge)


def scenes_checkpoint(folder: Path, **options) -> str:
    """A saved network of depth 3 for the classes of the scenes, with spread gates."""
    return str(_scenes_network(**options).save(folder))


@cache
def _scenes_network(**options) -> DynamicRoutingNetwork:
    torch.manual_seed(0)
    small = {"depth": 3, "base_channels": 8, "stem_channels": 8}
    classes = {"num_classes": len(CLASSES), "class_names": CLASSES, "palette": PALETTE}
    return spread_gates(DynamicRoutingNetwork(**small, **classes, **options))


def environment_with(*folders: Path) -> dict[str, str]:
    """For a process of Python's: one thread, these folders to import from, and the package that is tested here."""
    places = [*folders, Path(routeseg.__file__).parents[1]]  # another clone may be the one that is installed
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}


def run(words, capsys):
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """layouts(name) -> root of scenes in a layout of data/layouts.py: 4 train, 2 val, 48x96; only to be read."""
    made: dict[str, Path] = {}

    def root_of(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp("layouts") / name
            write_layout(name, root, DataConfig(image_size=(48, 96), train_images=4, val_images=2))
            made[name] = root
        return made[name]

    return root_of


@pytest.fixture
def copied(layouts, tmp_path):
    """copied(name) -> a copy of a layout that a test may damage."""
    return lambda name: Path(shutil.copytree(layouts(name), tmp_path / name))


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    if not CAMVID.is_dir():
        pytest.skip(f"no CamVid in {CAMVID}: set ROUTESEG_CAMVID to its folder")
    return CAMVID


@pytest.fixture
def server():
    """A server of one archive, which breaks and lies as a test tells it to."""
    with serve() as serving:
        yield serving


@pytest.fixture
def web_server():
    """web_server(folder) -> address of a server of its files, which also takes new ones (PUT)."""
    servers = []

    class Handler(SimpleHTTPRequestHandler):
        def do_PUT(self):
            path = Path(self.translate_path(self.path))
            path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_):
            pass

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def uneven(model):
    """A network whose exits are sure of some places and not of others, and whose BatchNorms do something."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for decoder in [*model.exits.decoders, model.head]:
        decoder.predictor.weight.normal_(std=0.5)
    return model


def uneven_images(batch: int, height: int, width: int, seed: int = 0, side: int = 24) -> torch.Tensor:
    """Noise that is stronger in some regions, squares of this side, than in others."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(batch, 1, -(-height // side), -(-width // side), generator=generator)
    strength = torch.nn.functional.interpolate(strength, (height, width))
    return 0.5 + strength * (torch.rand(batch, 3, height, width, generator=generator) - 0.5)
