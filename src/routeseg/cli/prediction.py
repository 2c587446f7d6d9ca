"""The commands about trained networks and files: predict, import-checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from jsonargparse import Namespace

from routeseg.budgets.asked import in_words, levels
from routeseg.cli.options import PRECISION_HELP, add_budget_arguments, progress_bar, read_budget, say_precision
from routeseg.cli.parser import USAGE_ERROR, Parser
from routeseg.cli.video import add_video_arguments, find_videos, frame_ms, predict_videos
from routeseg.data.decoding import IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, read_image
from routeseg.description import NetworkDescription
from routeseg.files import CONFIG_FILE, RESUME_FILE, RUN_CONFIG_FILE, WEIGHTS_FILE, best_of_run, bundled_networks
from routeseg.prediction.clips import is_video
from routeseg.prediction.files import Runner, asked_of, predict_files
from routeseg.prediction.onnx_runner import OnnxNetwork
from routeseg.prediction.ray import OpenRunner, predict_with_ray
from routeseg.prediction.sources import find_inputs, other_inputs

if TYPE_CHECKING:
    from routeseg.model import DynamicRoutingNetwork

NETWORK_SUFFIXES = (".onnx", ".safetensors", ".ckpt", ".pt", ".pth")  # of files that hold weights: never an image
CHECKPOINT_FILES = (WEIGHTS_FILE, CONFIG_FILE, RESUME_FILE)


def predict_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg predict")
    parser.add_argument(
        "inputs", nargs="*", help="[CHECKPOINT or FILE.onnx] then image files, folders, globs, URLs, @LIST; or videos"
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the network, if it is not the first word; or a bundled one: " + ", ".join(bundled_networks()),
    )
    parser.add_argument("--output", type=str, default="predictions", help="folder for the results, or a URL")
    parser.add_argument("--device", type=str, default="cpu", help="cpu; a checkpoint also runs on cuda")
    parser.add_argument("--precision", type=str | None, default=None, help=PRECISION_HELP)
    parser.add_argument("--pictures", type=bool, default=True, help="false: labels and JSON alone, which is faster")
    parser.add_argument("--resume", action="store_true", help="leave the results that are there as they are")
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help="an image that claims to have more is skipped, not decoded"
    )
    parser.add_argument(
        "--workers", type=int | None, default=None, help="predict in so many processes, with Ray; else in this process"
    )
    parser.add_argument(
        "--ray_address",
        type=str | None,
        default=None,
        help="predict on a Ray cluster, auto or HOST:PORT; --workers are then by default one for each core",
    )
    add_budget_arguments(parser)
    add_video_arguments(parser)
    args = parser.parse_args(list(words))

    named = [] if args.model is None else [args.model]
    network, inputs = _network_first([*named, *(args.inputs or ())])
    if named and network is None:
        names = ", ".join(bundled_networks())
        raise ValueError(f"--model {args.model} is no network: name a folder, an ONNX file, or one of {names}")
    if not args.inputs and args.source is None:
        raise ValueError("no inputs: name image files, folders, globs, URLs or videos, or a camera with --source")
    if network is not None and not inputs and args.source is None:
        raise ValueError(f"{network} is a network: name the images to segment behind it")
    if videos := find_videos(inputs, args):
        return predict_videos(videos, args, partial(_open, network, args))
    images = find_inputs(inputs)
    several = args.workers is not None or args.ray_address is not None
    common = {"resume": args.resume, "pictures": args.pictures, "max_pixels": args.max_pixels}
    if several:
        opener, description, asked = _opener(network, args)
        where = {"workers": args.workers, "address": args.ray_address, "device": args.device}
        with progress_bar("predict", len(images)) as step:
            summary = predict_with_ray(
                opener, description, images, args.output, on_image=step, asked=asked, **where, **common
            )
    else:
        runner = _open(network, args)
        with progress_bar("predict", len(images)) as step:
            summary = predict_files(runner, images, args.output, step, **common)
    print(summary.table())
    if others := other_inputs(inputs):
        print(f"passed over, as no images: {others}")
    network_of = description if several else runner.network
    if args.budget is not None and summary.predictions and network_of.config.place is None:
        steps = in_words(levels(network_of, summary.predictions[0].size))
        print(f"an image costs one of {steps} of the full network: a budget is kept in the mean of many")
    return USAGE_ERROR if summary.skipped else 0


def _is_onnx(network: str | None) -> TypeGuard[str]:
    return network is not None and network.lower().endswith(".onnx")


def _network_first(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The network that the first word names, if it names one, and the other words.

    Raises ValueError for a second network, and for a first word that is a file and neither a network nor an image: the
    bundled network must not take the place of one that was meant.
    """
    first = best_of_run(words[0]) if words else ""
    network = first if _is_network(first) else None
    inputs = list(words[network is not None :])
    for word in inputs:
        if _is_network(best_of_run(word)):
            raise ValueError(f"{word} is a network: name one, before the images")
    if network is None and words and Path(words[0]).is_file():
        if Path(words[0]).suffix.lower() not in IMAGE_SUFFIXES and not is_video(words[0]):
            try:
                read_image(Path(words[0]))
            except UnreadableImage as error:
                raise ValueError(
                    f"{words[0]} is no network and no image: name a folder with {WEIGHTS_FILE} and {CONFIG_FILE}, or "
                    "an ONNX file, and then the images"
                ) from error
    return network, inputs


def _is_network(word: str) -> bool:
    """Whether this names a file of weights, a folder that holds some or says what network they are of, or a run."""
    folder = Path(word)
    is_run = (folder / RUN_CONFIG_FILE).is_file() and (folder / "logs").is_dir()
    return word.lower().endswith(NETWORK_SUFFIXES) or is_run or any((folder / n).is_file() for n in CHECKPOINT_FILES)


def _open(network: str | None, args: Namespace) -> Runner:
    """What segments images in this process."""
    if _is_onnx(network):
        return _open_onnx(network, args)
    budget = read_budget(args)
    model = _load(network)

    from routeseg.cli.run.networks import find_device
    from routeseg.prediction.torch_runner import open_network

    runner = open_network(
        model,
        args.precision or "float32",
        find_device(args.device),
        budget=budget,
        steered=frame_ms(args) is not None,
    )
    say_precision(runner.forward)
    return runner


def _opener(network: str | None, args: Namespace) -> tuple[OpenRunner, NetworkDescription, Mapping[str, str | None]]:
    """What opens the network in another process, the network, and what is asked of it. Wrong options are found here,
    before Ray starts."""
    if _is_onnx(network):
        runner: Runner = _open_onnx(network, args)
        opener: OpenRunner = partial(OnnxNetwork, network, content=Path(network).read_bytes(), budget=read_budget(args))
        return opener, runner.network, asked_of(runner)
    model = _load(network)

    from routeseg.prediction.torch_runner import open_network

    precision, budget = args.precision or "float32", read_budget(args)
    if args.device != "cpu":  # only a worker has the GPU
        opener = partial(open_network, model, precision, args.device, budget=budget)
        dense = open_network(model, budget=budget)
        known = {} if args.precision == "auto" else {"precision": precision}
        return opener, dense.network, {"budget": dense.budget, **known}
    runner = open_network(model, precision, budget=budget)
    say_precision(runner.forward)
    if precision == "auto":
        precision = runner.precision  # one for all workers
    return partial(open_network, model, precision, budget=budget), runner.network, asked_of(runner)


def _open_onnx(file: str, args: Namespace) -> OnnxNetwork:
    """The network of an ONNX file. Raises ValueError for options that only apply to checkpoints."""
    for option, given, why in (
        *((name, getattr(args, name) is not None, f"{file} does not know of time") for name in ("fps", "frame_ms")),
        ("budget in ms", (args.budget or "").lower().endswith("ms"), f"{file} takes shares such as 40%, or GMACs"),
        ("device", args.device != "cpu", f"{file} runs on the CPU"),
        ("precision", args.precision is not None, f"{file} has its own (`routeseg export --int8` writes int8)"),
    ):
        if given:
            raise ValueError(f"--{option} only applies to checkpoints, {why}: leave it out")
    return OnnxNetwork(file, budget=read_budget(args))


def _load(checkpoint: str | None) -> DynamicRoutingNetwork:
    from routeseg.model import checkpoints

    if checkpoint is None:
        others = [name for name, folder in bundled_networks().items() if folder != checkpoints.PRETRAINED]
        print(f"using the bundled network for streets ({checkpoints.PRETRAINED.name}); others: {', '.join(others)}")
    return checkpoints.load_segmenter(checkpoint)


def import_checkpoint_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg import-checkpoint")
    parser.add_argument("file", type=str, help="one of the authors' checkpoints, .pth or .safetensors")
    parser.add_argument("output", type=str, help="folder to write")
    parser.add_argument("--small_gate", action="store_true", help="its gates see a quarter-size input (A, B, C)")
    parser.add_argument("--normalize", type=bool, default=True, help="fold the authors' input normalisation in")
    args = parser.parse_args(list(words))

    from routeseg.cli.run.importing import run_import

    return run_import(args)
