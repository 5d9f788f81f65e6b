"""Calibration: what a recipe leaves to the images, settled before the first step.

Takes a network and the batches that it is about to be trained on. Chooses which statistics the batch norms use, fits
the temperature of the loss and a classifier that was replaced, and measures how far the images want gates of their own.
Changes that classifier and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from se_inject.block import SqueezeExcite
from se_inject.dependence import measure_dependence
from se_inject.groups import iterate_batch_norms
from se_inject.heads import Classifier, find_classifier
from se_inject.loaders import TrainLoader
from se_inject.recipe import BatchNorm, Recipe
from se_inject.rewrite import blocks
from se_inject.twin import set_training
from se_inject.world import World

_NUM_IMAGES, _NUM_IMAGES_EACH = 2048, 16
_LOWEST, _HIGHEST, _NUM_TRIED = 0.5, 4.0, 85
_MARGIN = 1.5
"""New images are answered with less right to be sure than those that a network has learned from."""
_PENALTIES = (1e-2, 1e-1, 1.0)
_HELD_BACK = 4
_NUM_ITERATIONS = 100
_MAX_SCORES = 2**28
"""Scores of images by classes that a classifier is fitted with: 1 GiB in fp32."""


def calibrate(
    model: nn.Module,
    loader: TrainLoader,
    recipe: Recipe,
    world: World,
    *,
    fresh: Collection[str] = (),
    compute: Callable[[], Any],
) -> tuple[Recipe, float]:
    """Settle what a recipe leaves open, from up to 2,048 training images (16 a class, if those are more).

    **Batch norms** (`batch_norm: auto`). A network that is put into train mode normalises by the statistics of each
    batch instead of those that it has learned. Where the images are much like those that it knows, or unlike them in
    their colours alone, that does no harm or good; where batches are few, small or of another kind, it spoils the
    features. Whichever has the lower cross-entropy on these images is taken.

    **A classifier that was replaced** is fitted to the frozen features (regularised logistic regression, by L-BFGS), as
    random weights would send random gradients into a trained backbone (Kumar et al., arXiv 2202.10054). The strength
    of the penalty, and the choice of the statistics, are made on every fourth image, which the fit has not seen. With
    more than 16,384 classes, which want more images than memory has room for, it stays as it is.

    **The temperature of the loss** (`label_temperature: 0`). A network that was trained to the end is surer than it is
    right (Guo et al., arXiv 1706.04599). On images that differ from those it knows, its few confident errors then have
    nearly all of the gradient, and fine-tuning begins by breaking what was learned. Dividing the outputs in the loss by
    a temperature changes no answer, and gives every image its part again. It is one and a half times the one between
    0.5 and 4 at which the cross-entropy of these images is lowest, and 1 for a classifier that was replaced.

    **The rate of the blocks** (`se_lr: 0`) is the backbone's, or ten times that where the images want gates of their
    own (`measure_dependence`, on half as many images, as it runs the network backwards too; `Recipe.settle`).

    Args:
        model: As it is before the first step. A fresh classifier is given weights; nothing else is changed.
        loader: The first batches of its first epoch are used.
        recipe: What it does not leave open stays. Without labels (`distill: 1`) batch norms use the batches'
            statistics and the temperature is 1.
        world: The processes that train together; all of them settle the same.
        fresh: Names of the classifier's parameters, if it was replaced.
        compute: Makes the context in which the network runs, such as autocast.

    Returns:
        The recipe with `batch_norm`, `label_temperature` and `se_lr` settled, and how far the images want gates of
        their own; 0 where nothing hangs on it.
    """
    settled = _settle_outputs(model, loader, recipe, world, fresh=fresh, compute=compute)
    is_open = not recipe.se_lr and recipe.train == "all" and recipe.distill < 1 and settled.optimizer == "sgd"
    own = {path: block for path, block in blocks(model).items() if isinstance(block, SqueezeExcite)} if is_open else {}
    if not own:
        return settled, 0.0
    with set_training(model, False), _adapting(model, adapts=settled.batch_norm != "frozen"):
        found = measure_dependence(
            model, own, _take(loader, _NUM_IMAGES // 2), world, temperature=settled.label_temperature, compute=compute
        )
    return recipe.settle(settled.batch_norm, settled.label_temperature, found), found


def _settle_outputs(
    model: nn.Module,
    loader: TrainLoader,
    recipe: Recipe,
    world: World,
    *,
    fresh: Collection[str],
    compute: Callable[[], Any],
) -> Recipe:
    """Settle the statistics of the batch norms and the temperature, and fit a fresh classifier."""
    usual = recipe.settle("train", 1.0)
    is_settled = recipe.batch_norm != "auto" and recipe.label_temperature
    if recipe.distill == 1 or (is_settled and not fresh):
        return usual
    classifier = find_classifier(model, fresh, next(loader.iterate(0, 0))[0]) if fresh else None
    if fresh and (classifier is None or len(classifier.weight) ** 2 > _MAX_SCORES):
        return usual
    fit = _fit_temperature if classifier is None else partial(_fit_penalty, classifier=classifier)
    options: tuple[BatchNorm, ...] = (usual.batch_norm,)
    has_frozen = recipe.train == "gates" and bool(blocks(model))
    if has_frozen:  # by the stage, whatever the recipe says of batch norms
        options = ("frozen",)
    elif recipe.batch_norm == "auto" and any(iterate_batch_norms(model)):
        options = ("frozen", "train")
    seen: dict[BatchNorm, tuple[Tensor, Tensor]] = {}
    for option in options:
        with set_training(model, False), _adapting(model, adapts=option != "frozen"), torch.no_grad():
            seen[option] = _observe(model, classifier, loader, world, compute)
        if not len(seen[option][1]):
            return usual
    fits = {option: fit(*observed) for option, observed in seen.items()}
    best = min(fits, key=lambda option: fits[option][0])
    _, found = fits[best]
    if classifier is not None:
        _set_classifier(classifier, *_fit_linear(*seen[best], classifier, found))
    return recipe.settle("train" if has_frozen else best, 1.0 if classifier is not None else _MARGIN * found)


@contextmanager
def _adapting(model: nn.Module, *, adapts: bool) -> Iterator[None]:
    """Let batch norms use the statistics of each batch, and keep their own as they are."""
    norms = [norm for norm in iterate_batch_norms(model) if adapts]
    before = [bool(norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False  # type: ignore[assignment]  # torch's stubs
        yield
    finally:
        for norm, tracks in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = False, tracks  # type: ignore[assignment]  # torch's stubs


def _observe(
    model: nn.Module, classifier: Classifier | None, loader: TrainLoader, world: World, compute: Callable[[], Any]
) -> tuple[Tensor, Tensor]:
    """Observe what the classifier is given (N, channels), or else the outputs (N, classes), and the labels (N,)."""
    seen, known = [], []
    num = _NUM_IMAGES
    if classifier is not None:
        num_classes = len(classifier.weight)
        num = min(max(num, _NUM_IMAGES_EACH * num_classes), _MAX_SCORES // num_classes)
    hook = None if classifier is None else classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for images, labels in _take(loader, num):
            with compute():
                outputs = model(images)
            if classifier is None:
                seen.append(outputs)
            known.append(labels)
    finally:
        if hook is not None:
            hook.remove()
    observed = world.gather(torch.cat([item.flatten(1).float() for item in seen]))
    labels = world.gather(torch.cat(known))
    return observed[labels >= 0], labels[labels >= 0]


def _take(loader: TrainLoader, num: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Take the first batches of the first epoch, with at least so many images if there are."""
    return itertools.islice(loader.iterate(0, 0), -(-num // loader.batch_size))


def _fit_temperature(outputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Fit the temperature; gives the cross-entropy at it, and it."""
    tried = [_LOWEST * (_HIGHEST / _LOWEST) ** (i / (_NUM_TRIED - 1)) for i in range(_NUM_TRIED)]
    return min((float(F.cross_entropy(outputs / t, labels)), t) for t in tried)


def _fit_penalty(features: Tensor, labels: Tensor, classifier: Classifier) -> tuple[float, float]:
    """Fit a classifier to three of four images; gives the lowest cross-entropy of the others, and the penalty."""
    is_held = torch.arange(len(labels), device=labels.device) % _HELD_BACK == 0
    found = []
    for penalty in _PENALTIES:
        weight, bias = _fit_linear(features[~is_held], labels[~is_held], classifier, penalty)
        loss = F.cross_entropy(F.linear(features[is_held], weight, bias), labels[is_held])
        found.append((float(loss), penalty))
    return min(found)


def _fit_linear(
    features: Tensor, labels: Tensor, classifier: Classifier, penalty: float
) -> tuple[Tensor, Tensor | None]:
    """Fit weights (classes, channels) and a bias, if the classifier has one, by logistic regression."""
    has_bias = classifier.bias is not None
    center = features.mean(0) if has_bias else torch.zeros_like(features[0])
    scale = (features - center).square().mean().sqrt().clamp_min(1e-12)
    inputs = (features - center) / scale
    weight = inputs.new_zeros(len(classifier.weight), inputs.shape[1]).requires_grad_()
    bias = inputs.new_zeros(len(weight)).requires_grad_(has_bias)
    optimizer = torch.optim.LBFGS(
        [weight, bias] if has_bias else [weight], max_iter=_NUM_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(compute_loss)  # type: ignore[no-untyped-call]
    weight = weight.detach() / scale
    return weight, bias.detach() - weight @ center if has_bias else None


def _set_classifier(classifier: Classifier, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        classifier.weight.copy_(weight.view_as(classifier.weight))
        if classifier.bias is not None and bias is not None:
            classifier.bias.copy_(bias)
