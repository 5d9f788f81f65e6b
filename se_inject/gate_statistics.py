"""Statistics of gates: what the blocks of an injected network do on many images.

Takes what `gates` sees of each batch, gives means, variances and histograms by class and channel, in memory that does
not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from se_inject.block import SqueezeExcite
from se_inject.errors import DataError, OptionError
from se_inject.gates import Passed, get_own_blocks, watch_gates
from se_inject.twin import get_device, set_training

if TYPE_CHECKING:
    import xarray

NUM_BINS = 40
"""Of the histograms, over the range of a gate; a whole number of them is a twentieth of it."""
_EDGE = NUM_BINS // 20
"""Bins at either end whose gates count as saturated: within 5 % of the range."""


@dataclass(frozen=True)
class BlockGates:
    """What the gates of a block were on some images.

    Attributes:
        counts: (K,), images of each class.
        means: (K, C), mean gates by class; 0 for a class without images.
        variances: (K, C), of the gates of a class.
        mean: (C,), over all images, those without a class too.
        variance: (C,), likewise.
        histogram: (NUM_BINS,), how many gates lie where between 0 and `limit`.
        limit: What a gate can reach.
    """

    counts: Tensor
    means: Tensor
    variances: Tensor
    mean: Tensor
    variance: Tensor
    histogram: Tensor
    limit: float

    @property
    def variation(self) -> float:
        """Standard deviation of a gate over images: the root of the channels' mean variance."""
        return float(self.variance.mean().sqrt())

    @property
    def class_share(self) -> float | None:
        """The part of the variance over images that the class tells, from 0 to 1; None where no two classes vary.

        It is omega squared (Hays, Statistics, 1963), which does not grow when there are few images a class.
        """
        counts = self.counts.double()
        num_classes, num = int((counts > 0).sum()), float(counts.sum())
        if num_classes < 2 or num <= num_classes:
            return None
        means, weights = self.means.double(), counts[:, None]
        overall = (weights * means).sum(0) / num
        between = float((weights * (means - overall) ** 2).sum())
        within = float((weights * self.variances.double()).sum())
        error = within / (num - num_classes)
        total = between + within + error
        return max(0.0, between - (num_classes - 1) * error) / total if total > 0 else None

    @property
    def saturation(self) -> float:
        """The part of the gates within 5 % of either end of their range."""
        total = int(self.histogram.sum())
        return float((self.histogram[:_EDGE].sum() + self.histogram[-_EDGE:].sum()) / max(1, total))

    @property
    def distance(self) -> float:
        """How far the gates are from 1, the identity: the root of the mean square."""
        return float(((self.mean - 1) ** 2 + self.variance).mean().sqrt())

    @property
    def is_identity(self) -> bool:
        """Whether every gate is 1, as before training."""
        return self.distance == 0


class GateTally:
    """Adds up gates over batches.

    Args:
        blocks: Whose gates they are, by path.
        num_classes: K.
    """

    def __init__(self, blocks: Mapping[str, SqueezeExcite], num_classes: int) -> None:
        self._limits = {path: _get_limit(block) for path, block in blocks.items()}
        self._num_classes = num_classes
        self._sizes: dict[str, int] = {}
        self._shift = self._scale = self._sums = self._squares = torch.empty(0)
        self._histogram = self._offsets = torch.empty(0)
        self._counts = torch.empty(0)

    def add(self, passed: Mapping[str, Passed], labels: Tensor) -> None:
        """Add the gates of a batch.

        Args:
            passed: By block; the same blocks each time.
            labels: (N,); -1 is an image without a class, -2 one that is left out.
        """
        gates = torch.cat([each.gate.float() for each in passed.values()], 1)
        if not self._sizes:
            self._begin(passed, gates)
        gates, labels = gates[labels > -2], labels[labels > -2]
        rows = torch.where(labels < 0, self._num_classes, labels)
        # Taken off, the first batch's mean leaves small numbers, whose squares keep their digits.
        deviations = gates - self._shift
        self._sums.index_add_(0, rows, deviations)
        self._squares.index_add_(0, rows, deviations * deviations)
        self._counts += torch.bincount(rows, minlength=self._num_classes + 1)
        bins = (gates * self._scale).long().clamp_(0, NUM_BINS - 1) + self._offsets
        self._histogram += torch.bincount(bins.flatten(), minlength=len(self._histogram))

    def _begin(self, passed: Mapping[str, Passed], gates: Tensor) -> None:
        self._sizes = {path: each.gate.shape[1] for path, each in passed.items()}
        rows, device = self._num_classes + 1, gates.device
        self._shift = gates.mean(0)
        self._sums, self._squares = torch.zeros(2, rows, gates.shape[1], device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._histogram = torch.zeros(NUM_BINS * len(passed), dtype=torch.int64, device=device)
        sizes = torch.tensor(list(self._sizes.values()), device=device)
        limits = torch.tensor([self._limits[path] for path in passed], device=device)
        self._scale = (NUM_BINS / limits).repeat_interleave(sizes)
        self._offsets = (NUM_BINS * torch.arange(len(passed), device=device)).repeat_interleave(sizes)

    def summarise(self) -> dict[str, BlockGates]:
        """Summarise what was added, block by block in the order in which they run.

        Raises:
            DataError: No image was added.
        """
        num = int(self._counts.sum()) if self._sizes else 0
        if not num:
            raise DataError("there are no images whose gates could be seen")
        counts, shift = self._counts.cpu(), self._shift.cpu().double()
        sums, squares = self._sums.cpu(), self._squares.cpu()
        total, total_squares = sums.double().sum(0) / num, squares.double().sum(0) / num
        safe = counts.clamp_min(1)[:, None]
        # In the type of the sums: a thousand classes of a large network are many numbers.
        means = sums / safe
        variances = (squares / safe - means**2).clamp_min_(0)
        means = torch.where(counts[:, None] > 0, means + shift.float(), 0)
        mean, variance = total + shift, (total_squares - total**2).clamp_min(0)
        histograms = self._histogram.cpu().view(-1, NUM_BINS)
        found, first = {}, 0
        for (path, size), histogram in zip(self._sizes.items(), histograms, strict=True):
            own = slice(first, first + size)
            first += size
            found[path] = BlockGates(
                counts[:-1], means[:-1, own], variances[:-1, own], mean[own], variance[own], histogram,
                self._limits[path],
            )  # fmt: skip
        return found


def _get_limit(block: SqueezeExcite) -> float:
    """Return what a gate can reach: the gain, or 2 where it is `1 + tanh(...)`."""
    return 2.0 if block.gate == "tanh" else block.gain


def collect_gates(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    keep_images: bool = False,
) -> dict[str, xarray.Dataset]:
    """Collect what the gates of an injected network are on some images.

    Args:
        model: An injected network; it is run in eval mode and left as it is.
        loader: Gives images (N, ...), or tuples of these and their labels (N,), as a `DataLoader` does; a negative
            label is that of an image without a class.
        classes: Names of the classes; by default 0, 1, ... for as many as the network has outputs.
        keep_images: Keep every gate of every image too, which takes memory with their number.

    Returns:
        A dataset a block, by path, in the order in which the blocks run. Its arrays have named dimensions: `count`
        (class), `mean` and `std` (class, channel) of the gates by class, NaN for a class without images; `overall_mean`
        and `overall_std` (channel) of all images; `histogram` (gate), how many gates lie where. With `keep_images` also
        `gate` (image, channel), and `label` (image), -1 for an image without one.

    Raises:
        ModelError: The network has no squeeze-and-excitation block of ours.
        OptionError: xarray is not installed.
        DataError: There are no images, a batch is none of the above, or a label is none of the classes.

    Example:
        >>> gates = collect_gates(model, loader)  # doctest: +SKIP
        >>> gates["layer4.2.se"]["mean"].sel({"class": "cat"}).std("channel")  # doctest: +SKIP
    """
    tally: GateTally | None = None
    kept: dict[str, list[Tensor]] = {}
    all_labels = []
    own = get_own_blocks(model)
    device = get_device(model)
    with watch_gates(own) as watch, set_training(model, False), torch.no_grad():
        for batch in loader:
            images, labels = _open_batch(batch)
            outputs = model(images.to(device))
            if tally is None:
                num_classes = _count_classes(outputs) if classes is None else len(classes)
                tally = GateTally(own, num_classes)
            if len(labels) and int(labels.max()) >= num_classes:
                raise DataError(f"an image has the label {int(labels.max())}, there are {num_classes} classes")
            passed = watch.take(len(images))
            tally.add(passed, labels.to(device))
            for path, each in passed.items() if keep_images else ():
                kept.setdefault(path, []).append(each.gate.cpu())
            all_labels.append(labels.cpu())
    if tally is None:
        raise DataError("the loader gave no images")
    names = tuple(classes) if classes is not None else tuple(map(str, range(num_classes)))
    found = {path: make_dataset(gates, names) for path, gates in tally.summarise().items()}
    for path, parts in kept.items():
        found[path] = found[path].assign(
            gate=(("image", "channel"), torch.cat(parts).float().numpy()),
            label=("image", torch.cat(all_labels).numpy()),
        )
    return found


def _open_batch(batch: object) -> tuple[Tensor, Tensor]:
    """Return images and labels (N,), which are -1 where there is no class."""
    images, labels = batch[:2] if isinstance(batch, (tuple, list)) and len(batch) > 1 else (batch, None)
    images = images[0] if isinstance(images, (tuple, list)) and images else images
    if not isinstance(images, Tensor):
        raise DataError(f"a batch is a {type(batch).__name__}; expected images (N, ...), or a tuple of them and labels")
    if labels is None:
        return images, torch.full((len(images),), -1)
    labels = torch.as_tensor(labels)
    if labels.shape != (len(images),) or labels.is_floating_point():
        kind = str(labels.dtype).removeprefix("torch.")
        raise DataError(
            f"labels are {kind} of shape {tuple(labels.shape)}; expected a whole number an image, ({len(images)},)"
        )
    return images, labels.long().clamp_min(-1)


def make_dataset(gates: BlockGates, classes: Sequence[str]) -> xarray.Dataset:
    """Turn the gates of a block into arrays with named dimensions; see `collect_gates`.

    Raises:
        OptionError: xarray is not installed.
    """
    try:
        import xarray  # noqa: PLC0415  an extra
    except ImportError as error:
        raise OptionError("arrays with named dimensions need xarray: pip install 'se-inject[report]'") from error
    present = (gates.counts > 0)[:, None]
    by_class, by_channel = ("class", "channel"), ("channel",)
    arrays = {
        "count": (("class",), gates.counts.numpy()),
        "mean": (by_class, torch.where(present, gates.means, torch.nan).numpy()),
        "std": (by_class, torch.where(present, gates.variances.sqrt(), torch.nan).numpy()),
        "overall_mean": (by_channel, gates.mean.numpy()),
        "overall_std": (by_channel, gates.variance.sqrt().numpy()),
        "histogram": (("gate",), gates.histogram.numpy()),
    }
    centres = (torch.arange(NUM_BINS) + 0.5) * gates.limit / NUM_BINS
    coordinates = {"class": list(classes), "channel": range(len(gates.mean)), "gate": centres.numpy()}
    return xarray.Dataset(arrays, coordinates)


def _count_classes(outputs: object) -> int:
    return outputs.shape[1] if isinstance(outputs, Tensor) and outputs.ndim == 2 else 0
