"""Report, the images: those whose gates differ most from the mean, for one block.

Takes the gates of batches as they pass, keeps the few images that are farthest, and reads these again to be shown.
Memory does not depend on the number of images.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from se_inject.contents import get_name
from se_inject.gates import Passed
from se_inject.reading import UNREADABLE, BadImages, Images
from se_inject.validation import Validation

NUM_IMAGES = 12
SIZE = 96
"""Height and width of a thumbnail, at most."""


@dataclass(frozen=True)
class Picture:
    """An image whose gates differ from the mean.

    Attributes:
        index: Its number in the set.
        name: Of its file, where it has one.
        label: Name of its class; empty if it has none.
        distance: From the mean: the root of the mean square over channels.
        is_right: Whether the network classifies it right; None if that is not known.
        thumbnail: A JPEG file.
    """

    index: int
    name: str
    label: str
    distance: float
    is_right: bool | None
    thumbnail: bytes = field(repr=False)

    @property
    def uri(self) -> str:
        """The thumbnail, as the page has it."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.thumbnail).decode()}"


class Farthest:
    """Keeps the images whose gates are farthest from the mean.

    Args:
        path: The block's.
        mean: (C,), its mean gate.
        num: How many images are kept.
    """

    def __init__(self, path: str, mean: Tensor, num: int = NUM_IMAGES) -> None:
        self._path, self._mean, self._num = path, mean, num
        self._kept: list[tuple[float, int]] = []
        self._place = 0

    def add(self, passed: Mapping[str, Passed], labels: Tensor) -> None:
        """Add a batch; the images come in the order of the set."""
        gate = passed[self._path].gate.float()
        distances = (gate - self._mean.to(gate)).square().mean(1).sqrt()
        distances[labels <= UNREADABLE] = -1
        values, rows = distances.topk(min(self._num, len(distances)))
        # Of equal distances the first image stays.
        new = [(distance, -self._place - row) for distance, row in zip(values.tolist(), rows.tolist(), strict=True)]
        self._kept = heapq.nlargest(self._num, [*self._kept, *(each for each in new if each[0] >= 0)])
        self._place += len(labels)

    def list_farthest(self) -> list[tuple[int, float]]:
        """List the images' numbers and their distances, the farthest first."""
        return [(-place, distance) for distance, place in self._kept]


def read_pictures(
    found: Sequence[tuple[int, float]], validation: Validation, names: Sequence[str], hits: Tensor | None
) -> list[Picture]:
    """Read some images of a set again, to be shown.

    Args:
        found: Their numbers, and how far their gates are from the mean.
        validation: The set they are in.
        names: Of the classes.
        hits: See `Scores`.
    """
    own = validation.data.val
    images = Images(
        own, make_thumbnail, BadImages(own, len(found)), "RGB", 0, is_training=False, num_classes=validation.num_classes
    )
    pictures = []
    for index, distance in found:
        thumbnail, label = images[0, index]
        hit = 2 if hits is None else int(hits[index])
        pictures.append(
            Picture(
                index, Path(get_name(own, index)).name, names[label] if label >= 0 else "", distance,
                None if hit > 1 else hit == 1, thumbnail,
            )
        )  # fmt: skip
    return pictures


def make_thumbnail(image: Image.Image) -> bytes:
    """Make a small JPEG of an image."""
    small = image.convert("RGB")
    small.thumbnail((SIZE, SIZE))
    content = BytesIO()
    small.save(content, "JPEG", quality=85)
    return content.getvalue()
