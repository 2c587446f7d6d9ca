"""Training."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from routeseg.files import RESUME_FILE, check_writable, write_json
from routeseg.model import DynamicRoutingNetwork
from routeseg.model.checkpoints import read_config
from routeseg.training.callbacks import LAST_FOLDER
from routeseg.training.initialization import adopt_normalization, initialize


def start_from(model: DynamicRoutingNetwork, folder: str | None, output: Path, resume: bool) -> None:
    """Takes over the weights of a checkpoint folder by name, says which, and writes it to OUTPUT/init.json.

    A run that is resumed has its own weights, and the input normalisation that it began with.
    Raises ValueError if the weights do not fit.
    """
    first_process = getattr(rank_zero_only, "rank", 0) == 0
    if resume:
        if (output / LAST_FOLDER).is_dir():
            adopt_normalization(model, read_config(output / LAST_FOLDER))
        if folder is not None and first_process:
            print(f"--init {folder} is not used: --resume goes on with the weights of the run")
    elif folder is not None:
        report = initialize(model, folder)
        if first_process:
            print(report)
        if first_process and not (output / RESUME_FILE).exists():  # `train` refuses a folder that holds a run
            check_writable(output)
            write_json(output / "init.json", report.as_dict())
