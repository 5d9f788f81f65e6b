"""Layers: which layers of a network get a block where it has no merges, as in VGG and MobileNet v1.

Takes the layers that ran, in their order, gives those at which a block stands. Changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from se_inject.places import Border, LayerKind, Side
from se_inject.probe import LayerVisit

LAYER_SIDES: dict[LayerKind, tuple[Side, Border]] = {
    "stage": ("before", "input"),
    "conv": ("after", "output"),
    "depthwise": ("before", "input"),
}
"""On which side of its layer a block stands; of a module that is a layer, at which border."""
_SHRINKING = 1.5  # a convolution without padding loses a few positions, a downsampling half in a dimension


def choose_layers(layers: Sequence[LayerVisit], kind: LayerKind) -> list[LayerVisit]:
    """Choose the layers that get a block.

    Args:
        layers: The layers that ran, in their order.
        kind: "stage" is before each downsampling (pooling or strided convolution), once a resolution; "conv" after each
            convolution; "depthwise" after each depthwise convolution, before the pointwise layer that reads it.
    """
    chosen = {"stage": _choose_stages, "conv": _choose_convolutions, "depthwise": _choose_pointwise}[kind](layers)
    return list({(visit.entry, visit.index): visit for visit in chosen}.values())


def find_reader(layers: Sequence[LayerVisit], path: str) -> LayerVisit | None:
    """Find the layer of a module that reads its middle spatial convolution; None if that is its last layer."""
    inside = [visit for visit in layers if f"{visit.entry.path}.".startswith(f"{path}.")]
    spatial = [i for i, visit in enumerate(inside) if visit.call.is_spatial]
    middle = spatial[(len(spatial) - 1) // 2] if spatial else len(inside)
    reader = inside[middle + 1] if middle + 1 < len(inside) else None
    if reader is None or reader.call.kind == "pool" or reader.call.channels != inside[middle].call.out_channels:
        return None
    return reader


def _choose_convolutions(layers: Sequence[LayerVisit]) -> list[LayerVisit]:
    return [visit for visit in layers if visit.call.kind == "conv"]


def _choose_pointwise(layers: Sequence[LayerVisit]) -> list[LayerVisit]:
    chosen = []
    for visit, following in itertools.pairwise(layers):
        first, then = visit.call, following.call
        reads_it = then.channels == first.out_channels and then.positions == first.out_positions
        is_pointwise = then.kind in ("conv", "linear") and not then.is_spatial and not then.is_depthwise
        if first.is_depthwise and is_pointwise and reads_it:
            chosen.append(following)
    return chosen


def _choose_stages(layers: Sequence[LayerVisit]) -> list[LayerVisit]:
    chosen = []
    done: set[int] = set()  # resolutions whose end has its block
    for visit in layers:
        call = visit.call
        is_classifier = call.kind == "linear" or (call.kind == "conv" and call.out_positions == 1)
        is_downsampling = not is_classifier and call.positions >= _SHRINKING * call.out_positions
        if is_downsampling and not call.is_first and call.positions not in done:
            chosen.append(visit)
            done.add(call.positions)
        # Where a network has gone up again, as an hourglass does, the resolution will have another end.
        done = {positions for positions in done if positions > call.out_positions}
    return chosen
