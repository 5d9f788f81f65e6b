"""Images: turn a picture into an input as the model expects it, and its output into named classes.

Takes paths, a model and its source, gives predictions. timm and torchvision do the transforms and know the class names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from se_inject.calls import Entry
from se_inject.errors import ExampleError, OptionError, SourceError
from se_inject.formats import IMAGE_ERRORS, convert_image
from se_inject.plan import Plan
from se_inject.provenance import Source
from se_inject.twin import get_device, get_dtype, set_training

_DEFAULT_SIZE = (3, 224, 224)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Prediction:
    """A class that an image may show.

    Attributes:
        index: The output's index.
        name: The class's name; `class 7` where no names are known.
        probability: Its softmax probability.
    """

    index: int
    name: str
    probability: float


def make_transform(source: Source | None, plan: Plan | None = None) -> Callable[[Image.Image], Tensor]:
    """Make the transform from a PIL image to an input (C, H, W): the source's own, or ImageNet's at the plan's size.

    Raises:
        SourceError: What the source says of its images is not what its library takes.
    """
    try:
        return _make_transform(source, plan)
    except (TypeError, ValueError, KeyError, LookupError, AssertionError) as error:
        raise SourceError(f"the file's preprocessing is none of its library's: {error!r:.200}") from error


def _make_transform(source: Source | None, plan: Plan | None) -> Callable[[Image.Image], Tensor]:
    preprocess = dict(source.preprocess) if source is not None else {}
    library = preprocess.pop("library", None)
    if library == "torchvision":
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms._presets import ImageClassification

        preprocess["interpolation"] = InterpolationMode(preprocess["interpolation"])
        preset: Callable[[Image.Image], Tensor] = ImageClassification(**preprocess)
        return lambda image: preset(convert_image(image, "RGB"))

    from timm.data import create_transform

    if library is None:
        size = read_size(plan)
        mean, std = (_MEAN, _STD) if size[0] == len(_MEAN) else ((sum(_MEAN) / 3,), (sum(_STD) / 3,))
        preprocess = {"input_size": size, "mean": mean, "std": std, "crop_pct": 1.0}
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in preprocess.items()}
    mode = "L" if options["input_size"][0] == 1 else "RGB"
    transform = create_transform(**options, is_training=False)
    return lambda image: transform(convert_image(image, mode))


def predict_image(
    model: nn.Module,
    path: Path,
    transform: Callable[[Image.Image], Tensor],
    *,
    classes: Sequence[str] = (),
    top_k: int = 5,
) -> list[Prediction]:
    """Name the most probable classes of an image.

    Args:
        model: A classifier; run in eval mode, its own mode is kept.
        path: The image file.
        transform: From `make_transform`.
        classes: Names of the network's outputs; without any, ImageNet's where their number fits.
        top_k: How many classes.

    Raises:
        ExampleError: The file is no image, or the network gives no class scores.
        OptionError: `top_k` is below 1.
    """
    if top_k < 1:
        raise OptionError(f"top-k is {top_k}; it must be at least 1")
    try:
        with Image.open(path) as image:
            pixels = transform(image)
    except IMAGE_ERRORS as error:
        reason = (
            "it is no image that Pillow can read"
            if isinstance(error, UnidentifiedImageError)
            else getattr(error, "strerror", None) or error
        )
        raise ExampleError(f"{path} cannot be read: {reason}") from error
    with set_training(model, False), torch.no_grad():
        try:
            scores = model(pixels.unsqueeze(0).to(get_device(model), get_dtype(model)))
        except (RuntimeError, TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ExampleError(f"the network does not run on {path} as {tuple(pixels.shape)}: {line}") from error
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise ExampleError("the network gives no scores (N, classes); predict is for classifiers")
    probabilities, indices = scores[0].float().softmax(0).topk(min(top_k, scores.shape[1]))
    names = classes.__getitem__ if len(classes) == scores.shape[1] else get_class_names(scores.shape[1])
    return [
        Prediction(index, names(index), probability)
        for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]


def get_class_names(num_classes: int) -> Callable[[int], str]:
    """Return the function that names a class: ImageNet's names, carried by timm, where the number of classes fits."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return lambda index: f"class {index}"
    info = ImageNetInfo(subset)
    return lambda index: str(info.index_to_description(index)).partition(",")[0]


def read_size(plan: Plan | None) -> tuple[int, int, int]:
    """Read (C, H, W) of the input that a plan was made with; ImageNet's if it was none."""
    call: Mapping[str, Any] = plan.calls.get(Entry("").key, {}) if plan is not None else {}
    first = next(iter(call.get("args", [])), None)
    shape = first.get("tensor", []) if isinstance(first, Mapping) else []
    return tuple(shape[1:]) if len(shape) == 4 else _DEFAULT_SIZE
