"""The commands about trained networks and files: predict, import-checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routeseg.cli.common import USAGE_ERROR, Parser, progress_bar


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
    with progress_bar("predict", len(paths)) as step:
        summary = predict_files(build_engine(model, args.engine), model, paths, Path(args.output), step)
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
