"""The machine, the date and the versions that a result file names. PyTorch is not imported for it."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("routeseg", "torch", "lightning")  # whose versions a result file names
CPUINFO = Path("/proc/cpuinfo")  # Linux has it
# Instructions that decide how fast a network is, in Linux's words: a result file names those that the machine has.
ISA = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def machine_facts() -> dict[str, Any]:
    """Machine, date and versions, for a result file; threads and GPU only if this process has used PyTorch."""
    cpu, torch = _cpu_facts(), sys.modules.get("torch")
    flags = cpu.get("flags", "").split()
    return {
        "machine": {
            "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
            "isa": [name for name in ISA if name in flags],
            "cores": os.cpu_count(),
            **({} if torch is None else _torch_facts(torch)),
        },
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def _torch_facts(torch: ModuleType) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor; nothing on other systems."""
    if not CPUINFO.exists():
        return {}
    pairs = (line.partition(":") for line in CPUINFO.read_text().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
