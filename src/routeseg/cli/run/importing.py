"""Import-checkpoint."""

from __future__ import annotations

from jsonargparse import Namespace

from routeseg.cost.macs import model_cost
from routeseg.model.authors import import_checkpoint


def run_import(args: Namespace) -> int:
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
