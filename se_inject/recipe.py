"""Recipes: how a network is fine-tuned.

A frozen `Recipe`, and what it leaves to the images settled. Knows nothing of files, networks and data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

BatchNorm = Literal["auto", "train", "frozen", "sync"]
Precision = Literal["auto", "bf16", "fp32"]
Crop = Literal["resized", "padded", "none"]
Train = Literal["all", "gates"]


@dataclass(frozen=True)
class Recipe:
    """How a network is fine-tuned. Rates are those of `batch_size` images a step.

    Attributes:
        epochs: Passes over the training images; a part of one is allowed.
        batch_size: Images a step, over all processes together.
        seed: Every random draw is a function of it, the step and the image.
        train: "all", or "gates" for the blocks alone, with backbone and batch norms frozen.
        gates_share: The part of the steps, from the first, in which the blocks alone learn.
        gates_lr: Peak learning rate of the blocks in these steps.
        lr: Peak learning rate of the backbone afterwards.
        se_lr: Peak learning rate of the blocks afterwards; 0 is `lr`, or with SGD ten times that where the training
            images want gates of their own (`calibrate`).
        head_lr: Peak learning rate of a classifier that was replaced; it is fitted before the first step.
        warmup_share: The part of each stage's steps in which the rates rise from zero.
        min_lr_share: The rate of each group at the end of the cosine, as a part of its peak.
        optimizer: A name of timm's `create_optimizer_v2`; "auto" is SGD, or with frozen batch norms AdamW at 0.03 of
            the rates and 0.3 of `se_lr`, which then rise in at least 0.3 of the steps.
        momentum: Of optimizers that have one.
        weight_decay: Of everything but biases, norms and other vectors.
        clip: The gradient's norm is clipped to this; 0 is not at all.
        batch_norm: "train" as usual; "frozen" keeps statistics, weights and biases; "auto" is one of these, settled
            by the training images before the first step (`calibrate`); "sync" computes the statistics over all
            processes (CUDA).
        ema: Decay of the moving average of the weights, which is what is evaluated and written; 0 is none. It is lower
            in the first steps (timm's warm-up).
        label_temperature: Outputs are divided by it before they are compared with labels; 0 fits it to the training
            images before the first step (`calibrate`), unless the classifier was replaced, which leaves 1. The
            network that is written gives undivided outputs.
        smoothing: Label smoothing.
        mixup: Alpha of mixup; 0 is none.
        cutmix: Alpha of CutMix; 0 is none.
        distill: Weight of the original network's outputs against the labels, 0 to 1. At 1 no labels are needed.
        temperature: Of the softmax under which outputs are compared.
        crop: "resized" crops at random scale and ratio; "padded" shifts by up to an eighth, for small images; "none".
        scale: Range of the crop's area, as a part of the image.
        ratio: Range of the crop's width over height.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of the change of brightness, contrast and saturation.
        auto_augment: timm's policy, as in "rand-m9-mstd0.5"; empty is none.
        erase: Probability of random erasing.
        precision: "bf16" computes under autocast; "auto" does so where a GPU computes in bf16.
        channels_last: Whether maps lie in memory as (N, H, W, C), which convolutions of most devices prefer.
        workers: Processes that read images, for each process that trains; 0 reads in the process itself.
        checkpoint_minutes: A checkpoint is written at least so often, and after each epoch.
    """

    epochs: float = 3
    batch_size: int = 64
    seed: int = 0
    train: Train = "all"
    gates_share: float = 0.0
    gates_lr: float = 0.1
    lr: float = 0.01
    se_lr: float = 0.0
    head_lr: float = 0.01
    warmup_share: float = 0.05
    min_lr_share: float = 0.01
    optimizer: str = "auto"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 3.0
    batch_norm: BatchNorm = "auto"
    ema: float = 0.99
    label_temperature: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    temperature: float = 1.0
    crop: Crop = "resized"
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str = ""
    erase: float = 0.0
    precision: Precision = "auto"
    channels_last: bool = True
    workers: int = 2
    checkpoint_minutes: float = 5.0

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed."""
        return bool(self.mixup or self.cutmix)

    def settle(self, batch_norm: BatchNorm, label_temperature: float, dependence: float = 0.0) -> Recipe:
        """Fill in what the recipe leaves to the images; what it does not leave open stays.

        Args:
            batch_norm: For "auto".
            label_temperature: For 0.
            dependence: From `measure_dependence`; what the rate of the blocks goes by, if it is 0.

        A convolution in front of a batch norm that uses the batch's statistics may be scaled as one likes, so that SGD
        finds a rate for each by itself. Statistics that are kept do not balance the layers; Adam does.
        """
        settled = replace(
            self,
            batch_norm=batch_norm if self.batch_norm == "auto" else self.batch_norm,
            label_temperature=self.label_temperature or label_temperature,
            se_lr=self.se_lr or self.lr,
        )
        if self.optimizer == "auto" and settled.batch_norm == "frozen":
            rates = {key: share * getattr(settled, key) for key, share in _ADAM.items()}
            return replace(settled, optimizer="adamw", warmup_share=max(self.warmup_share, _ADAM_WARMUP), **rates)
        if self.optimizer == "auto":
            settled = replace(settled, optimizer="sgd")
        if settled.optimizer == "sgd" and not self.se_lr and dependence >= _DEPENDENT:
            return replace(settled, se_lr=_DEPENDENT_RATE * self.lr)
        return settled

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values, for a file."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


_ADAM = {"gates_lr": 0.03, "lr": 0.03, "se_lr": 0.3, "head_lr": 0.03}
"""Adam's rates as a part of SGD's with momentum. Its steps are as large as the rate, and blocks begin with zeros."""
_ADAM_WARMUP = 0.3
"""Adam's first steps are as long as the rate, however small the gradient; nine steps without this lost 5 points."""
_DEPENDENT, _DEPENDENT_RATE = 0.005, 10.0
"""From which dependence on the blocks' rate is how many times the backbone's; recipes/README.md has the figures."""
