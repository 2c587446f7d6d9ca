"""The commands about trained networks and files: predict, import-checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from routeseg.cli.common import PRECISION_HELP, USAGE_ERROR, Parser, find_device, progress_bar
from routeseg.files import CONFIG_FILE

if TYPE_CHECKING:
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.prediction.files import PredictionSummary, Runner


def predict_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg predict")
    parser.add_argument(
        "inputs", nargs="+", help="[CHECKPOINT or FILE.onnx] then image files, folders, globs, URLs, or @LIST"
    )
    parser.add_argument("--output", type=str, default="predictions", help="folder for the results, or a URL")
    parser.add_argument(
        "--engine",
        type=str | None,
        default=None,
        help="of a checkpoint: skip, dense, or ray: skip in several processes",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, or of a checkpoint cuda")
    parser.add_argument("--precision", type=str, default="float32", help=PRECISION_HELP)
    parser.add_argument("--pictures", type=bool, default=True, help="false: labels and JSON alone, which is faster")
    parser.add_argument("--resume", action="store_true", help="leave the results that are there as they are")
    parser.add_argument("--workers", type=int | None, default=None, help="of engine ray; by default one for each core")
    parser.add_argument(
        "--ray_address", type=str | None, default=None, help="auto or HOST:PORT of a running Ray cluster"
    )
    args = parser.parse_args(list(words))

    from routeseg.prediction.files import predict_files
    from routeseg.prediction.onnx_runner import OnnxNetwork
    from routeseg.prediction.sources import find_inputs

    for option in ("workers", "ray_address"):
        if args.engine != "ray" and args[option] is not None:
            raise ValueError(f"--{option} is of --engine ray: add that, or leave --{option} out")
    if args.engine == "ray" and args.precision != "float32":
        raise ValueError("--precision is of --engine skip: leave it out with --engine ray")
    inputs = list(args.inputs)
    network = inputs.pop(0) if _is_network(inputs[0]) else None
    if network is not None and not inputs:
        raise ValueError(f"{network} is a network: name the images to segment behind it")
    for word in inputs:
        if _is_onnx(word):
            raise ValueError(f"{word} is a network: name one, before the images")
    common = {"resume": args.resume, "pictures": args.pictures}
    if args.engine == "ray" and not _is_onnx(network):
        summary = _predict_with_ray(network, inputs, args, common)
    else:
        images = find_inputs(inputs)
        runner: Runner
        if network is not None and _is_onnx(network):
            _check_onnx_options(network, args)
            runner = OnnxNetwork(network)
        else:
            runner = _torch_network(network, args)
        with progress_bar("predict", len(images)) as step:
            summary = predict_files(runner, images, args.output, step, **common)
    print(summary.table())
    return USAGE_ERROR if summary.skipped else 0


def _is_onnx(network: str | None) -> bool:
    return network is not None and network.lower().endswith(".onnx")


def _is_network(word: str) -> bool:
    """Whether this names an ONNX file or a checkpoint folder."""
    return _is_onnx(word) or (Path(word) / CONFIG_FILE).is_file()


def _check_onnx_options(network: str, args: Namespace) -> None:
    """Raises ValueError for options of checkpoints alone."""
    if args.engine is not None:
        raise ValueError(f"--engine is of checkpoints, and {network} is run by ONNX Runtime: leave --engine out")
    if args.device != "cpu":
        raise ValueError(f"--device {args.device} is of checkpoints, and {network} runs on cpu: leave --device out")
    if args.precision != "float32":
        raise ValueError(
            f"--precision is of checkpoints, and {network} has its own: leave it out (`routeseg export` writes int8)"
        )


def _load(checkpoint: str | None) -> DynamicRoutingNetwork:
    from routeseg.model import checkpoints

    if checkpoint is None:
        print(f"using the network that is shipped, trained on CamVid ({checkpoints.PRETRAINED.name})")
    return checkpoints.load(checkpoint)


def _torch_network(checkpoint: str | None, args: Namespace) -> Runner:
    """The network of a checkpoint on its device, with its engine."""
    from routeseg.engine import build_engine
    from routeseg.prediction.torch_runner import TorchNetwork

    model = _load(checkpoint).to(find_device(args.device))
    return TorchNetwork(build_engine(model, args.engine or "skip", args.precision), model)


def _predict_with_ray(
    checkpoint: str | None, inputs: Sequence[str], args: Namespace, common: dict[str, bool]
) -> PredictionSummary:
    from routeseg.prediction.ray import predict_with_ray, require_ray
    from routeseg.prediction.sources import find_inputs

    require_ray()
    images, model = find_inputs(inputs), _load(checkpoint)
    with progress_bar("predict", len(images)) as step:
        return predict_with_ray(model, images, args.output, args.workers, args.ray_address, args.device, step, **common)


def import_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg import-checkpoint")
    parser.add_argument("file", type=str, help="one of the authors' checkpoints, .pth or .safetensors")
    parser.add_argument("output", type=str, help="folder to write")
    parser.add_argument("--small_gate", action="store_true", help="its gates see a quarter-size input (A, B, C)")
    parser.add_argument("--normalize", type=bool, default=True, help="fold the authors' input normalisation in")
    args = parser.parse_args(list(words))

    from routeseg.cost.macs import model_cost
    from routeseg.model.authors import import_checkpoint

    model = import_checkpoint(args.file, args.small_gate, args.normalize)
    folder = model.save(args.output)
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    gates = "no" if not config.gated else "small" if config.small_gate else "full"
    print(
        f"{folder}: {model.space}, {config.base_channels} channels, {config.num_classes} classes, {gates} gates, "
        f"{parameters / 1e6:.3f} M parameters, "
        f"{model_cost(model, (1024, 2048)).full / 1e9:.2f} GMACs at 1024x2048"
    )
    return 0
