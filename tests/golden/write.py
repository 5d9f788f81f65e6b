"""Write the golden files of the present format version: `python -m tests.golden.write VERSION`, once a version.

Files that are there are never written again: later versions must load what earlier ones wrote.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from se_inject import blocks, inject, optimize, save, save_adapter
from se_inject.provenance import Source

FOLDER = Path(__file__).parent
SOURCE = Source("timm", "resnet18", {"channels": [8, 8, 16, 16], "num_classes": 3})


def draw_images() -> Tensor:
    return torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def build_network() -> nn.Module:
    """A small ResNet-18, whose numbers are the same with every version of torch and on every processor."""
    network = timm.create_model(SOURCE.name, **SOURCE.options).eval()
    fill(network)
    return network


def fill(module: nn.Module) -> None:
    for i, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        if tensor.is_floating_point():
            wave = (torch.arange(tensor.numel()) * (2 * i + 37) % 251 - 125) / 125
            positive = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
            scale = 0.5 if tensor.ndim == 1 else (2 / tensor[0].numel()) ** 0.5
            tensor.copy_((wave.abs() / 2 + 0.75 if positive else wave * scale).view_as(tensor))


def build() -> nn.Module:
    model = inject(build_network(), r={"*": 4, "layer4.*": 8}, exclude=["layer1.0"])
    for block in blocks(model).values():
        fill(block)
    return model.eval()


def main(version: str) -> None:
    model = build()
    named = {"artifact": model, "optimized": optimize(model)}
    for suffix in (".pt", ".safetensors"):
        for kind, network in named.items():
            path = FOLDER / f"{kind}-{version}{suffix}"
            if not path.exists():
                save(network, path, source=SOURCE)
        path = FOLDER / f"adapter-{version}{suffix}"
        if not path.exists() and version != "1":
            save_adapter(model, path)
    expected = FOLDER / "outputs.json"
    if not expected.exists():
        with torch.no_grad():
            expected.write_text(json.dumps(model(draw_images()).double().tolist(), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
