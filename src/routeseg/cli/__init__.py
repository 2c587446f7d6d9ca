"""The `routeseg` command: see COMMANDS at the end.

Every user mistake ends in one message on stderr and exit code 2.
"""

from __future__ import annotations

import atexit
import difflib
import gc
import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from routeseg.cli.logs import log_to_stderr
from routeseg.cli.parser import USAGE_ERROR
from routeseg.errors import printable

__all__ = ["COMMANDS", "main"]

# What a deployment may do without (docs/prediction.md).
LEFT_OUT = ("filelock", "huggingface_hub", "lightning", "pooch", "safetensors", "scipy", "torch", "torchmetrics")

OTHER_WORK = 0.7  # processes that want to run, in the mean of the last minute


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        _print_any_name(stream)
    if arguments is None:  # the process is the command's own
        atexit.register(gc.freeze)  # at its end nobody needs Python to look for garbage
        _let_threads_sleep()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        from routeseg.version import __version__

        print(f"routeseg {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"routeseg: error: no command {words[0]!r}: {hint}", file=sys.stderr)
        return USAGE_ERROR
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, without their names
    try:
        with log_to_stderr():
            module = importlib.import_module(f"routeseg.cli.{COMMANDS[words[0]][0]}")
            return getattr(module, f"{words[0].replace('-', '_')}_command")(words[1:])
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"routeseg: error: {_message(error)}", file=sys.stderr)
        return USAGE_ERROR
    except ModuleNotFoundError as error:
        if error.name not in LEFT_OUT:
            raise
        print(
            f"routeseg: error: this needs {error.name}, which is not installed: `pip install routeseg` brings it. "
            "Without it there is `routeseg predict FILE.onnx IMAGES`",
            file=sys.stderr,
        )
        return USAGE_ERROR
    except RuntimeError as error:
        if (
            "routeseg.training.processes" not in sys.modules
        ):  # then no training stopped, and there may be no torch to import
            raise
        from routeseg.training.processes import ProcessLost, TrainingStopped

        if not isinstance(error, TrainingStopped):
            raise
        print(f"routeseg: stopped: {error}", file=sys.stderr, flush=True)
        if isinstance(error, ProcessLost):
            os._exit(1)  # an orderly end would wait for the lost one
        return 1
    except KeyboardInterrupt as stop:
        print(": ".join(["routeseg: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)


def _let_threads_sleep() -> None:
    """If other work uses a core already, PyTorch's threads sleep while they wait for each other, unless the user has
    said how they wait. By default they spin: a tenth to a fifth faster alone, and two to three times as slow beside
    other work (benchmarks/busy.py). Read when torch is imported."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > OTHER_WORK:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _print_any_name(stream: Any) -> None:
    """A file name may be no text in the terminal's encoding: its odd bytes are printed with backslashes."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _message(error: Exception) -> str:
    """The message alone, even if a loader process wrapped it in a traceback."""
    text = str(error)
    if text.startswith("Caught "):
        text = re.split(r"\n\w*(?:Error|UnreadableImage): ", text)[-1]
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return printable(text).strip()


def _overview() -> str:
    lines = ["usage: routeseg COMMAND [options]      (routeseg COMMAND --help for the options)", ""]
    return "\n".join(lines + [f"  {name:<18} {text}" for name, (_, text) in COMMANDS.items()])


COMMANDS = {  # the module of this package that has NAME_command, a function of the words; what it does
    "train": ("training", "train a network: --config FILE [--section.key value]"),
    "calibrate": ("training", "fit what a network with exits expects of each to a data set, and its budgets"),
    "pretrain": ("training", "train a classifier (ImageNet), whose weights `train --init` starts from"),
    "evaluate": ("analysis", "mIoU and real cost of a checkpoint over a data set"),
    "routes": ("analysis", "how often each path is open over a data set, and whether routes follow scale"),
    "profile": ("profiling", "measure the milliseconds of a network on this machine, exit by exit: --size HxW"),
    "architectures": ("analysis", "the known networks as routes: size, cost, and a drawing"),
    "predict": ("prediction", "segment image files: labels, overlays and routes"),
    "app": ("app", "see it choose: the explorer in the browser, [CHECKPOINT]"),
    "export": ("export", "write a network as an ONNX file: of one route, or with its gates"),
    "import-checkpoint": ("prediction", "read one of the authors' released networks"),
    "check-data": ("data", "look a data set over before training: files, labels, classes; a verdict"),
    "convert-data": ("data", "make a COCO or VOC export of a labelling tool loadable: coco or voc"),
    "make-data": ("data", "write procedural street scenes in the layout of a known data set"),
    "download": ("data", "fetch camvid, voc2012 or sbd, with checksum and resume: NAME FOLDER"),
    "demo": ("training", "train, evaluate and report in a few minutes"),
}
