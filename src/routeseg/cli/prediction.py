"""The commands about trained networks and files: predict, import-checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routeseg.cli.common import USAGE_ERROR, Parser, find_device, progress_bar


def predict_command(words: Sequence[str]) -> int:
    parser = Parser(prog="routeseg predict")
    parser.add_argument("inputs", nargs="+", help="[CHECKPOINT] then image files, folders, globs, URLs, or @LIST")
    parser.add_argument("--output", type=str, default="predictions", help="folder for the results, or a URL")
    parser.add_argument("--engine", type=str, default="skip", help="skip, dense, or ray: skip in several processes")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--pictures", type=bool, default=True, help="false: labels and JSON alone, which is faster")
    parser.add_argument("--resume", action="store_true", help="leave the results that are there as they are")
    parser.add_argument("--workers", type=int | None, default=None, help="of engine ray; by default one for each core")
    parser.add_argument(
        "--ray_address", type=str | None, default=None, help="auto or HOST:PORT of a running Ray cluster"
    )
    args = parser.parse_args(list(words))

    from routeseg import checkpoints
    from routeseg.collection import find_inputs
    from routeseg.engine import build_engine
    from routeseg.model.grid import CONFIG_FILE
    from routeseg.prediction import predict_files
    from routeseg.ray_prediction import predict_with_ray, require_ray

    for option in ("workers", "ray_address"):
        if args.engine != "ray" and args[option] is not None:
            raise ValueError(f"--{option} is of --engine ray: add that, or leave --{option} out")
    inputs = list(args.inputs)
    given = (Path(inputs[0]) / CONFIG_FILE).is_file()
    if given and len(inputs) == 1:
        raise ValueError(f"{inputs[0]} is a checkpoint: name the images to segment behind it")
    checkpoint = inputs.pop(0) if given else None
    if checkpoint is None:
        print(f"using the network that is shipped, trained on CamVid ({checkpoints.PRETRAINED.name})")
    if args.engine == "ray":
        require_ray()
    images = find_inputs(inputs)
    model = checkpoints.load(checkpoint)
    common = {"resume": args.resume, "pictures": args.pictures}
    with progress_bar("predict", len(images)) as step:
        if args.engine == "ray":
            summary = predict_with_ray(
                model, images, args.output, args.workers, args.ray_address, args.device, step, **common
            )
        else:
            model = model.to(find_device(args.device))
            summary = predict_files(build_engine(model, args.engine), model, images, args.output, step, **common)
    print(summary.table())
    return USAGE_ERROR if summary.skipped else 0


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
