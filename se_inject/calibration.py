"""Calibration: how much too sure a trained network is of its answers.

Takes a network and the batches that it is about to be trained on, gives the temperature of the loss. Changes no weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from se_inject.loaders import TrainLoader
from se_inject.twin import set_training
from se_inject.world import World

_NUM_IMAGES = 2048
_LOWEST, _HIGHEST, _NUM_TRIED = 0.5, 4.0, 85
_MARGIN = 1.5
"""New images are answered with less right to be sure than those that a network has learned from."""


def fit_temperature(model: nn.Module, loader: TrainLoader, world: World, compute: Callable[[], Any]) -> float:
    """Fit the temperature by which outputs are divided in the loss, before the first step.

    A network that was trained to the end is surer than it is right (Guo et al., arXiv 1706.04599). On images that
    differ from those it knows, its few confident errors then have nearly all of the gradient, and fine-tuning begins by
    breaking what was learned. Dividing the outputs in the loss by a temperature changes no answer, and gives every
    image its part again.

    Args:
        model: As it is before the first step; it is run in eval mode.
        loader: The first batches of its first epoch are used, up to 2,048 images over all processes.
        world: The processes that train together; all of them get the same number.
        compute: Makes the context in which the network runs, such as autocast.

    Returns:
        One and a half times the temperature between 0.5 and 4 at which the cross-entropy of these images is lowest; 1
        if none of them has a label.
    """
    tried = torch.logspace(0, 1, _NUM_TRIED, base=_HIGHEST / _LOWEST, device=world.device) * _LOWEST
    losses = torch.zeros(_NUM_TRIED, dtype=torch.float64, device=world.device)
    count = torch.zeros((), dtype=torch.int64, device=world.device)
    with set_training(model, False), torch.no_grad():
        for images, labels in itertools.islice(loader.iterate(0, 0), -(-_NUM_IMAGES // loader.batch_size)):
            with compute():
                outputs = model(images)
            outputs, targets = outputs[labels >= 0].float(), labels[labels >= 0]
            losses += torch.stack([F.cross_entropy(outputs / t, targets, reduction="sum") for t in tried])
            count += len(targets)
    world.add_up(losses)
    world.add_up(count)
    return _MARGIN * float(tried[losses.argmin()]) if int(count) else 1.0
