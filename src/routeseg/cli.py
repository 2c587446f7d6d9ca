"""The `routeseg` command: see COMMANDS at the end.

Every user mistake ends in one message on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from routeseg.files import check_writable, write_atomically, write_json

if TYPE_CHECKING:
    from routeseg.data.datamodule import DataConfig
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import RoutingSpace
    from routeseg.training import Recipe

USAGE_ERROR = 2
NETWORK_SKIP = {"num_classes", "class_names", "palette", "pixel_mean", "pixel_std"}  # the data decide these


class Parser(ArgumentParser):
    """jsonargparse, with the nearest valid name for a key that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        known = [a.dest for a in self._actions if a.dest not in ("help", "==SUPPRESS==")]
        for wrong in _unknown_keys(message):
            near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
            near = near or [key for key in known if key.rsplit(".", 1)[-1] == wrong.rsplit(".", 1)[-1]][:1]
            hint = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
            message = f"no key {wrong!r} in the configuration: {hint}"
            break
        print(f"routeseg: error: {_first_lines(message)}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def _unknown_keys(message: str) -> list[str]:
    """The names that jsonargparse does not know, from its messages for files and for the command line."""
    pairs = re.findall(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    alone = re.findall(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: --([\w.\-]+)", message)
    return [".".join(pair) for pair in pairs] + ["".join(pair) for pair in alone]


def _first_lines(message: str) -> str:
    return " ".join(line.strip() for line in message.strip().splitlines()[:6])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        from routeseg import __version__

        print(f"routeseg {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"routeseg: error: no command {words[0]!r}: {hint}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return COMMANDS[words[0]][0](words[1:])
    except (ValueError, OSError) as error:
        print(f"routeseg: error: {_message(error)}", file=sys.stderr)
        return USAGE_ERROR
    except RuntimeError as error:
        from routeseg.training import NonFiniteLoss

        if not isinstance(error, NonFiniteLoss):
            raise
        print(f"routeseg: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("routeseg: interrupted", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    """The message alone, also where a loader process raised it and wrapped it in a traceback."""
    text = str(error)
    if text.startswith("Caught "):
        text = re.split(r"\n\w*(?:Error|UnreadableImage): ", text)[-1]
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return text.strip()


def _quiet_libraries() -> None:
    """Silences remarks of libraries that no user can act on; to be called once they are imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.|lightning_utilities\.")


def _overview() -> str:
    lines = ["usage: routeseg COMMAND [options]      (routeseg COMMAND --help for the options)", ""]
    return "\n".join(lines + [f"  {name:<18} {text}" for name, (_, text) in COMMANDS.items()])


def config_parser(command: str) -> Parser:
    """The typed configuration: sections model, data, recipe and budget; files with --config, then single keys."""
    from routeseg.cost import Budget
    from routeseg.data.datamodule import DataConfig
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.training import Recipe

    parser = Parser(prog=f"routeseg {command}", exit_on_error=True)
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below; may be given again")
    parser.add_class_arguments(DynamicRoutingNetwork, "model", skip=NETWORK_SKIP, as_group=True)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(Budget, "budget")
    return parser


def read_parts(parser: Parser, words: Sequence[str]) -> tuple[Namespace, Any, Any, Any]:
    """The parsed words and the data, recipe and budget sections as objects."""
    from routeseg.cost import Budget
    from routeseg.data.datamodule import DataConfig
    from routeseg.training import Recipe

    args = parser.parse_args(list(words))
    _quiet_libraries()
    data, recipe, budget = (
        kind(**vars(args[key])) for kind, key in ((DataConfig, "data"), (Recipe, "recipe"), (Budget, "budget"))
    )
    return args, data, recipe, budget


def train_command(words: Sequence[str]) -> int:
    parser = config_parser("train")
    parser.add_argument("--output", type=str, default="runs/train", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt")
    parser.add_argument("--devices", type=str, default="auto", help="how many devices, or auto")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto")
    args, data, recipe, budget = read_parts(parser, words)

    from routeseg.tables import print_evaluation
    from routeseg.training import train

    model = new_network(args, data, recipe)
    result = train(
        model,
        data,
        recipe,
        budget,
        Path(args.output),
        resume=args.resume,
        devices=args.devices if args.devices == "auto" else int(args.devices),
        accelerator=args.accelerator,
    )
    if not result.trainer.is_global_zero:
        return 0
    if result.evaluation is not None:
        print_evaluation(result.evaluation)
    print(f"{result.seconds / 60:.1f} minutes; networks in {result.output}/best and {result.output}/last")
    return 0


def evaluate_command(words: Sequence[str]) -> int:
    parser = config_parser("evaluate")
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder")
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    parser.add_argument("--split", type=str, default="val", help="train, val or test")
    parser.add_argument("--engine", type=str, default="skip", help="skip (closed paths cost nothing) or dense")
    parser.add_argument("--convention", type=str, default="authors", help="how cost is counted: authors or full")
    args, data, recipe, _ = read_parts(parser, words)

    from routeseg import checkpoints
    from routeseg.data.datamodule import evaluation_loader, open_data
    from routeseg.engine import build_engine
    from routeseg.evaluation import evaluate, machine_facts
    from routeseg.tables import print_evaluation

    model = checkpoints.load(args.checkpoint)
    pictures = open_data(data, args.split, recipe.seed)
    _check_classes(args.checkpoint, model, data, len(pictures.classes))
    if args.json is not None:
        check_writable(Path(args.json).parent, "--json")
    with _progress(f"evaluate {data.name} {args.split}", len(pictures)) as step:
        loader = evaluation_loader(pictures, data.workers)
        result = evaluate(model, loader, build_engine(model, args.engine), args.convention, step)
    print_evaluation(result)
    if args.json is not None:
        write_json(Path(args.json), result.as_dict() | {"command": ["evaluate", *words]} | machine_facts())
    return 0


def routes_command(words: Sequence[str]) -> int:
    from routeseg.route_statistics import PERMUTATIONS

    parser = config_parser("routes")
    parser.add_argument("checkpoint", type=str, help="a checkpoint folder, of a network with gates")
    parser.add_argument("--split", type=str, default="val", help="train, val or test")
    parser.add_argument("--output", type=str, default="runs/routes", help="folder for routes.json and the figures")
    parser.add_argument("--images", type=int | None, default=None, help="only so many, evenly spread over the set")
    parser.add_argument(
        "--common", type=float | None, default=None, help="write common_route.json: edges open in this share of images"
    )
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="relabellings of the permutation test")
    args, data, recipe, _ = read_parts(parser, words)

    from routeseg import checkpoints
    from routeseg.architectures import common_route
    from routeseg.cost import model_cost
    from routeseg.data.datamodule import open_data
    from routeseg.engine import build_engine
    from routeseg.evaluation import machine_facts
    from routeseg.route_survey import draw_survey, evenly_spread, pictures_to_see, survey_routes
    from routeseg.tables import print_survey

    model, output = checkpoints.load(args.checkpoint), Path(args.output)
    pictures = open_data(data, args.split, recipe.seed)
    _check_classes(args.checkpoint, model, data, len(pictures.classes))
    if args.common is not None and not 0 < args.common <= 1:
        raise ValueError(f"--common is {args.common}: it is a share of the images, above 0 and at most 1")
    check_writable(output)
    engine = build_engine(model)
    total = pictures_to_see(data, len(evenly_spread(pictures, args.images)))
    with _progress(f"routes over {data.name} {args.split}", total) as step:
        survey = survey_routes(
            model, engine, data, args.split, recipe.seed, args.images, args.permutations, step, args.checkpoint
        )
    common = None if args.common is None else common_route(survey.observation.gates, args.common)
    figures = draw_survey(survey, model, engine, output)
    facts = {"command": ["routes", *words], "data": data.name, "split": args.split, "seed": recipe.seed}
    write_json(output / "routes.json", survey.as_dict() | facts | machine_facts())
    print_survey(survey)
    if common is not None:
        write_atomically(output / "common_route.json", (common.to_json() + "\n").encode())
        static_gmacs = model_cost(model, survey.observation.pictures.read(0)[1].shape).of_route(common) / 1e9
        print(
            f"{len(common)} edges open in {100 * args.common:g} % of the images, {static_gmacs:.3f} GMACs as a static "
            f"network: train it with --model.gate fixed --model.route {output}/common_route.json"
        )
    print(f"{output}/routes.json and {len(figures)} figures beside it: " + ", ".join(path.name for path in figures))
    return 0


def predict_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg predict")
    parser.add_argument("inputs", nargs="+", help="[CHECKPOINT] then image files, folders or globs")
    parser.add_argument("--output", type=str, default="predictions", help="folder for the results")
    parser.add_argument("--engine", type=str, default="skip", help="skip or dense")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    args = parser.parse_args(list(words))

    from routeseg import checkpoints
    from routeseg.engine import build_engine
    from routeseg.model.network import CONFIG_FILE
    from routeseg.prediction import find_inputs, predict_files

    inputs = list(args.inputs)
    given = (Path(inputs[0]) / CONFIG_FILE).is_file()
    if given and len(inputs) == 1:
        raise ValueError(f"{inputs[0]} is a checkpoint: name the images to segment behind it")
    checkpoint = inputs.pop(0) if given else None
    if checkpoint is None:
        print(f"using the network that is shipped, trained on CamVid ({checkpoints.PRETRAINED.name})")
    paths = find_inputs(inputs)
    model = checkpoints.load(checkpoint).to(args.device)
    with _progress("predict", len(paths)) as step:
        summary = predict_files(build_engine(model, args.engine), model, paths, Path(args.output), step)
    print(summary.table())
    return USAGE_ERROR if summary.skipped else 0


def architectures_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg architectures")
    parser.add_argument("--size", type=str, default="1024x2048", help="HEIGHTxWIDTH of the image that costs are for")
    parser.add_argument("--depth", type=int, default=16, help="layers of the routing space")
    parser.add_argument("--base_channels", type=int, default=64, help="channels at the finest scale")
    parser.add_argument("--num_classes", type=int, default=19)
    parser.add_argument("--convention", type=str, default="authors", help="how cost is counted: authors, full or conv")
    parser.add_argument("--json", type=str | None, default=None, help="also write the table to this file")
    parser.add_argument("--figure", type=str | None, default=None, help="draw all of them into this .png or .svg")
    args = parser.parse_args(list(words))
    match = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if not match or min(size := (int(match[1]), int(match[2]))) < 32:
        raise ValueError(f"--size is {args.size!r}: give HEIGHTxWIDTH, both at least 32, such as 1024x2048")

    from routeseg.architecture_table import architecture_table
    from routeseg.architectures import ARCHITECTURES
    from routeseg.figures import picture_kind, route_grid
    from routeseg.space import Route, RoutingSpace
    from routeseg.tables import print_architectures

    space = RoutingSpace(args.depth)
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path is not None:
            check_writable(Path(path).parent, option)
    if args.figure is not None:
        picture_kind(args.figure)
    rows = architecture_table(
        space,
        size,
        num_classes=args.num_classes,
        base_channels=args.base_channels,
        convention=args.convention,
    )
    print_architectures(rows, f"{space}, {args.base_channels} channels, {args.num_classes} classes, at {args.size}")
    if args.json is not None:
        write_json(Path(args.json), rows)
    if args.figure is not None:
        routes = [*(known(space) for known in ARCHITECTURES.values()), Route.all_open(space)]
        panels = [
            (
                f"{row['name']}: {row['static_gmacs']:.1f} GMACs, {row['static_params_m']:.1f} M parameters",
                route.to_gates(),
            )
            for row, route in zip(rows, routes, strict=True)
        ]
        route_grid(args.figure, space, panels)
    return 0


def import_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg import-checkpoint")
    parser.add_argument("file", type=str, help="one of the authors' checkpoints, .pth or .safetensors")
    parser.add_argument("output", type=str, help="folder to write")
    parser.add_argument("--small_gate", action="store_true", help="its gates see a quarter-size input (A, B, C)")
    parser.add_argument("--normalize", type=bool, default=True, help="fold the authors' input normalisation in")
    args = parser.parse_args(list(words))

    from routeseg import checkpoints
    from routeseg.cost import model_cost

    model = checkpoints.import_checkpoint(args.file, args.small_gate, args.normalize)
    folder = model.save(args.output)
    parameters = sum(p.numel() for p in model.parameters())
    gates = "no" if not model.gated else "small" if model.small_gate else "full"
    print(
        f"{folder}: {model.space}, {model.base_channels} channels, {model.num_classes} classes, {gates} gates, "
        f"{parameters / 1e6:.3f} M parameters, "
        f"{model_cost(model, (1024, 2048)).full / 1e9:.2f} GMACs at 1024x2048"
    )
    return 0


def make_data_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg make-data")
    parser.add_argument("name", type=str, help="scenes")
    parser.add_argument("output", type=str, help="folder to write: images/, masks/ and classes.yaml")
    parser.add_argument("--train", type=int, default=200, help="training pictures")
    parser.add_argument("--val", type=int, default=50, help="validation pictures")
    parser.add_argument("--size", type=tuple[int, int], default=(256, 512), help="[height, width]")
    parser.add_argument("--preset", type=str, default="mixed", help="large, small or mixed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(list(words))
    if args.name != "scenes":
        raise ValueError(f"cannot make {args.name!r}: choose scenes")

    from routeseg.data.datamodule import DataConfig, write_folder

    config = DataConfig(image_size=args.size, preset=args.preset, train_images=args.train, val_images=args.val)
    with _progress("make-data", args.train + args.val) as step:
        write_folder(config, Path(args.output), args.seed, step)
    print(f"{args.output}: {args.train} training and {args.val} validation pictures")
    print(f"train on them with --data.name folder --data.root {args.output}")
    return 0


def demo_command(words: Sequence[str]) -> int:
    parser = config_parser("demo")
    parser.add_argument("--output", type=str, default="runs/demo", help="folder of the run and its report")
    parser.add_argument("--minutes", type=float | None, default=None, help="time to train; else recipe.iterations")
    args, data, recipe, budget = read_parts(parser, words)

    from routeseg.demo import run_demo

    run_demo(new_network(args, data, recipe), data, recipe, budget, Path(args.output), args.minutes)
    return 0


def new_network(args: Namespace, data: DataConfig, recipe: Recipe) -> DynamicRoutingNetwork:
    """The network of the model section, for the classes of the data, with weights drawn from the recipe's seed."""
    import torch

    from routeseg.data.datamodule import open_data
    from routeseg.model import DynamicRoutingNetwork
    from routeseg.space import RoutingSpace

    classes = open_data(data, "train", recipe.seed).classes
    options = vars(args.model)
    if str(options["route"]).endswith(".json"):
        options = options | {
            "route": _read_route(Path(options["route"]), RoutingSpace(args.model.depth, args.model.num_scales))
        }
    torch.manual_seed(recipe.seed)
    return DynamicRoutingNetwork(
        num_classes=len(classes), class_names=classes.names, palette=classes.palette, **options
    )


def _read_route(path: Path, space: RoutingSpace) -> list[tuple[int, int, str]]:
    """The edges of a route file, as `Route.to_json` and `routeseg predict` write it."""
    from routeseg.space import Route, edge_name

    try:
        route = Route.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    if route.space != space:
        raise ValueError(f"{path} is drawn in {route.space}, the network has {space}: set --model.depth to match")
    for edge in sorted(route.dead_ends):
        raise ValueError(
            f"{path} has {len(route.dead_ends)} open edges that no path leads to, the first is {edge_name(edge)}: take "
            "them out of its list `open`, or open a path to them"
        )
    return route.named_edges


def _check_classes(checkpoint: str, model: DynamicRoutingNetwork, data: DataConfig, classes: int) -> None:
    """Raises ValueError where the data set has not as many classes as the network."""
    if classes != model.num_classes:
        raise ValueError(
            f"{checkpoint} has {model.num_classes} classes, the data set {data.name} has {classes}: "
            "give the configuration that it was trained with"
        )


class _progress:
    """A progress bar as a context; entering gives a function that advances it by one."""

    def __init__(self, title: str, total: int) -> None:
        from rich.progress import Progress

        self.bar = Progress(transient=True)
        self.task = self.bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train_command, "train a network: --config FILE [--section.key value]"),
    "evaluate": (evaluate_command, "mIoU and real cost of a checkpoint over a data set"),
    "routes": (routes_command, "how often each path is open over a data set, and whether routes follow scale"),
    "architectures": (architectures_command, "the known networks as routes: size, cost, and a picture"),
    "predict": (predict_command, "segment image files: labels, overlays and routes"),
    "import-checkpoint": (import_command, "read one of the authors' released networks"),
    "make-data": (make_data_command, "write procedural street scenes as an image/label folder"),
    "demo": (demo_command, "train, evaluate and report in a few minutes"),
}


if __name__ == "__main__":
    raise SystemExit(main())
