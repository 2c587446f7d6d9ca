"""The command profile: it measures a table of milliseconds on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from routeseg.cli.common import config_parser, network_options
from routeseg.cli.logs import quiet_libraries
from routeseg.cli.options import PRECISION_HELP, enough_memory, parse_size, progress_bar
from routeseg.files import best_of_run, check_writable, write_json
from routeseg.space import size_words

if TYPE_CHECKING:
    from routeseg.model import DynamicRoutingNetwork

OUTPUT = "runs/profile"  # if no checkpoint is given
CLASSES = 19  # of a network without a checkpoint


def profile_command(words: Sequence[str]) -> int:
    from routeseg.cost.latency import REPEATS

    parser = config_parser("profile", ["model"])
    parser.add_argument(
        "checkpoint",
        type=str | None,
        nargs="?",
        default=None,
        help="a checkpoint folder; without one, a network with random weights, as the model section says",
    )
    parser.add_argument(
        "--size",
        type=str,
        default="1024x2048",
        help="HEIGHTxWIDTH of the image; also measured in the sizes at which the network may look at it",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", type=str, default="float32", help=PRECISION_HELP)
    parser.add_argument(
        "--num_classes", type=int | None, default=None, help=f"classes of a network without a checkpoint; {CLASSES}"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="forwards to each exit; their median counts")
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"folder; by default the checkpoint's, or {OUTPUT}"
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the table to this file")
    args = parser.parse_args(list(words))
    args.checkpoint = args.checkpoint and best_of_run(args.checkpoint)
    size = parse_size("--size", args.size)
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}: it must be at least 1")
    model = _network(args, words)

    from routeseg.cli.run.networks import find_device
    from routeseg.cli.tables import print_latency
    from routeseg.engine.profiling import profile
    from routeseg.evaluation import machine_facts

    quiet_libraries()
    model = model.to(find_device(args.device))
    output = Path(args.output or args.checkpoint or OUTPUT)
    check_writable(output)
    if args.json is not None:
        check_writable(Path(args.json).parent, "--json")
    looks = model.config.sizes or (1.0,)
    with enough_memory("give a smaller --size"), progress_bar("profile", len(looks) * (1 + args.repeats)) as step:
        tables = [profile(model, size, args.precision, args.repeats, step=step, look=look) for look in looks]
    table = next(one for one in tables if one.look == 1)
    if "precision_reason" in table.facts:
        print(f"precision: {table.precision} ({table.facts['precision_reason']})")
    for one in tables:
        one.facts.update({"command": ["profile", *words]} | machine_facts())
        one.write(output / f"{one.name}.json")
    print_latency(table, model)
    for one in tables:
        least, most = one.exits_ms[[0, -1]]
        looked = f": looked at in {size_words(one.look)} of its sides {least:.3g} to {most:.3g} ms" if looks[1:] else ""
        print(f"{output / one.name}.json{looked}")
    if args.json is not None:
        write_json(args.json, table.as_dict())
    return 0


def _network(args: Namespace, words: Sequence[str]) -> DynamicRoutingNetwork:
    """The checkpoint's network, or one with random weights as the model section says."""
    from routeseg.model import checkpoints

    if args.checkpoint is not None:
        for word in words:
            if word.startswith(("--model", "--num_classes")):
                raise ValueError(
                    f"{word.partition('=')[0]} describes a network without a checkpoint: leave it out, or leave out "
                    f"{args.checkpoint}"
                )
        return checkpoints.load_segmenter(args.checkpoint)
    from routeseg.config import NetworkConfig

    config = NetworkConfig(num_classes=args.num_classes or CLASSES, **network_options(args))

    import torch

    from routeseg.model import DynamicRoutingNetwork

    torch.manual_seed(args.seed)
    return DynamicRoutingNetwork(config).eval()
