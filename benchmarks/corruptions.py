"""Images that differ from each other as those of many devices do: a copy of a folder, each image with a corruption.

    python -m benchmarks.corruptions FOLDER OUT [--share SHARE]

Each image gets one of eight corruptions, or none, of a random strength: Gaussian noise, blur, contrast, brightness,
saturation, pixelation, gamma, a colour cast. All but the last two are of the kinds of ImageNet-C (Hendrycks and
Dietterich, 2019), by torchvision and with strengths of their own. What an image gets depends on its path in the folder
alone, so that the copy is the same each time. Networks are trained and tested on such images: what is measured is not
robustness, but what a network makes of images that want to be treated one by one. With --share 0.5 one image in two is
left as it is. The copies are PNG.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


def add_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to an image x (3, H, W) between 0 and 1; strength is between 0 and 1, here and below."""
    return x + torch.randn(x.shape, generator=generator) * (0.04 + 0.16 * strength)


def blur(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Blur, for 32 pixels by 0.5 to 1.5 of them."""
    sigma = (0.5 + strength) * x.shape[-1] / 32
    size = 2 * round(3 * sigma) + 1
    return F.gaussian_blur(x, [size, size], [sigma, sigma])


def lower_contrast(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Lower the contrast."""
    return F.adjust_contrast(x, 0.7 - 0.5 * strength)


def change_brightness(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Make all values larger or smaller."""
    return x + _toss(generator) * (0.15 + 0.3 * strength)


def lower_saturation(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Take colour away."""
    return F.adjust_saturation(x, 1 - strength)


def pixelate(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Make pixels larger."""
    height, width = x.shape[-2:]
    small = F.resize(x, [round((0.8 - 0.4 * strength) * side) for side in (height, width)], antialias=True)
    return F.resize(small, [height, width], interpolation=InterpolationMode.NEAREST)


def change_gamma(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Make the dark values darker or lighter."""
    return x**2.5 ** (_toss(generator) * (0.3 + strength))


def cast_colour(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Dim each colour by another factor."""
    return x * (1 - 0.8 * strength * torch.rand(3, 1, 1, generator=generator))


KINDS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "none": lambda x, *_: x,
    "noise": add_noise,
    "blur": blur,
    "contrast": lower_contrast,
    "brightness": change_brightness,
    "saturation": lower_saturation,
    "pixelation": pixelate,
    "gamma": change_gamma,
    "colour": cast_colour,
}


def corrupt(image: Image.Image, seed: int) -> Image.Image:
    """Corrupt an image; seed decides how."""
    generator = torch.Generator().manual_seed(seed)
    kind = list(KINDS)[torch.randint(len(KINDS), (), generator=generator)]
    strength = torch.rand((), generator=generator).item()
    x = F.to_dtype(F.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)
    corrupted: Image.Image = F.to_pil_image(KINDS[kind](x, strength, generator).clamp(0, 1))
    return corrupted


def _toss(generator: torch.Generator) -> int:
    return 1 if torch.rand((), generator=generator) < 0.5 else -1


def main() -> None:
    """Write the copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=1, help="Of the images that may be corrupted.")
    options = parser.parse_args()
    suffixes = get_img_extensions(as_set=True)
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        parser.error(f"found no images in {options.folder}; expected a folder with train and test")
    for path in paths:
        name = path.relative_to(options.folder)
        target = (options.out / name).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        is_left = zlib.crc32("".join(("blend", *name.with_suffix("").parts)).encode()) >= options.share * 2**32
        with Image.open(path) as image:
            (image if is_left else corrupt(image, zlib.crc32(name.as_posix().encode()))).save(target)
    print(f"{len(paths)} images in {options.out}")


if __name__ == "__main__":
    main()
