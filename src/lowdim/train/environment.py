"""Versions and hardware, which every result records."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lowdim

__all__ = ["environment", "installed", "processor"]


@cache
def environment() -> dict[str, Any]:
    """Versions and hardware, as recorded in every result."""
    memory = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        memory = int(meminfo.read_text(encoding="utf-8", errors="replace").split()[1]) * 1024
    return {
        "lowdim": lowdim.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "accelerate": installed("accelerate"),
        "os": platform.platform(terse=True),
        "cpu": processor(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": memory,
    }


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    # Read from the installation without importing the package: a reproduction of a solver needs neither.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
