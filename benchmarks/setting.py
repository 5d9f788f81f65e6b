"""What a measurement was made with: hardware, versions and commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

import torch

from se_inject.world import name_device


def describe_setting() -> dict[str, str]:
    """Describe processor, Python, libraries and commit."""
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    packages = {name: version(name) for name in ("torch", "timm", "torchvision")}
    return {"cpu": name_device(torch.device("cpu")), "python": platform.python_version(), "commit": commit, **packages}
