"""Formats: what images are turned into for a network, in training and in validation.

Takes what a `Source` says of preprocessing and a recipe, gives transforms from PIL images. timm and torchvision do the
work; batches are normalised on the device.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from se_inject.errors import DataError, OptionError
from se_inject.recipe import Recipe

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, RuntimeError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for files that are no images, or broken ones."""

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class InputFormat:
    """What images are turned into for a network.

    Attributes:
        size: (C, H, W).
        mean: Of each channel, of values from 0 to 1.
        std: Likewise.
        crop_pct: The part of an image's shorter side that validation sees.
        interpolation: "bilinear" or "bicubic".
        crop_mode: timm's: "center", "squash" or "border".
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    @property
    def mode(self) -> str:
        """Pillow's name for the colours."""
        return "L" if self.size[0] == 1 else "RGB"

    def to_preprocess(self) -> dict[str, Any]:
        """Write as a `Source` has it, so that `predict` does the same as validation."""
        return {
            "library": "timm",
            "input_size": list(self.size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


def check_input_size(input_size: int | None) -> None:
    """Refuse a size that no image has.

    Raises:
        OptionError: It is below 1.
    """
    if input_size is not None and input_size < 1:
        raise OptionError(f"the input size is {input_size}; it must be at least 1")


def read_format(
    preprocess: Mapping[str, Any], default_size: tuple[int, ...], *, input_size: int | None, in_chans: int
) -> InputFormat:
    """Read the format from what a `Source` says; where it says nothing, ImageNet's statistics at the default size.

    Raises:
        DataError: The network takes neither grey nor coloured images.
        OptionError: The size is below 1.
    """
    check_input_size(input_size)
    if in_chans not in (1, 3):
        raise DataError(f"the network takes images with {in_chans} channels; expected 1 (grey) or 3 (RGB)")
    values = dict(preprocess)
    if values.get("library") == "torchvision":
        values["input_size"] = [in_chans, values["crop_size"], values["crop_size"]]
        # The next smaller number, because timm rounds the size that it divides by this down.
        values["crop_pct"] = math.nextafter(values["crop_size"] / values["resize_size"], 0)
    size = tuple(values.get("input_size") or default_size)
    crop_pct = float(values.get("crop_pct") or 1.0)
    if input_size is not None:
        size = (in_chans, input_size, input_size)
        crop_pct = crop_pct if preprocess else 1.0
    mean, std = (tuple(values.get(key) or default) for key, default in (("mean", _MEAN), ("std", _STD)))
    if len(mean) != in_chans:
        mean, std = (tuple([sum(x) / len(x)] * in_chans) for x in (mean, std))
    interpolation, crop_mode = values.get("interpolation") or "bilinear", values.get("crop_mode") or "center"
    return InputFormat((in_chans, *size[-2:]), mean, std, crop_pct, interpolation, crop_mode)


def make_train_transform(form: InputFormat, recipe: Recipe) -> Transform:
    """Make the augmentation of a recipe; gives uint8 arrays (C, H, W), which are normalised on the device."""
    jitter: Any = recipe.color_jitter or None
    made: Any = transforms_imagenet_train(
        form.size[1:],
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=jitter,
        force_color_jitter=True,  # beside a policy too
        auto_augment=recipe.auto_augment or None,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        use_prefetcher=True,
    )
    _mend_posterize(made)
    if recipe.crop == "resized":
        whole: Transform = made
        return whole
    size = form.size[1:]
    first: list[Any] = [transforms.Resize(size, InterpolationMode(form.interpolation))]
    if recipe.crop == "padded":
        first.append(transforms.RandomCrop(size, padding=max(size) // 8))
    shifted: Transform = transforms.Compose([*first, *made.transforms[1:]])
    return shifted


def _mend_posterize(transform: object) -> None:
    """Let timm's policies go down to no bits, which is black, as they were written; Pillow refuses it from 13 on."""
    waiting = [transform]
    while waiting:
        item = waiting.pop()
        if isinstance(item, AugmentOp) and item.aug_fn is posterize:
            item.aug_fn = _posterize
        elif isinstance(item, (list, tuple)):
            waiting += item
        else:  # a pipeline, or a policy with its operations
            waiting += (getattr(item, name) for name in ("transforms", "ops", "policy") if hasattr(item, name))


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def make_eval_transform(form: InputFormat) -> Transform:
    """Make the transform of validation: resize, crop the middle."""
    made: Transform = create_transform(
        form.size,
        crop_pct=form.crop_pct,
        crop_mode=form.crop_mode,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        use_prefetcher=True,
    )
    return made


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to "RGB" or "L".

    16 bits are scaled to 8, whatever the image uses of them, where Pillow alone would make it white. What has 32 bits
    is taken for 8 or 16 of them by its largest value, and floating-point numbers for 0 to 1 or 0 to 255.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        largest = values.max(initial=0)
        if image.mode == "F":
            scale = 255.0 if largest <= 1 else 1.0
        else:
            has_16 = image.mode != "I" or image.format == "PNG"  # which Pillow before 11 reads as 32
            scale = 1 / 257 if has_16 or largest > 255 else 1.0  # 65535 becomes 255
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
