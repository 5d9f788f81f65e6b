"""What a measurement was made with: hardware, versions and commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def describe_setting() -> dict[str, str]:
    """Describe processor, Python, libraries and commit."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    packages = {name: version(name) for name in ("torch", "timm", "torchvision")}
    return {"cpu": cpu, "python": platform.python_version(), "commit": commit, **packages}
