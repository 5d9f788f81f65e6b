"""Recipes: how a network is fine-tuned, as a file that a person reads, copies and edits.

Takes the name of a recipe or a YAML file and overrides, gives a frozen `Recipe`, or one error that lists all that is
wrong. Knows nothing of networks and data.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.optim import get_optimizer_info, list_optimizers

from se_inject.errors import RecipeError

DEFAULT_RECIPE = "short"
_PACKAGE = Path(__file__).parent

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


_POSITIVE = ("epochs", "batch_size", "temperature", "checkpoint_minutes")
_ADAM = {"gates_lr": 0.03, "lr": 0.03, "se_lr": 0.3, "head_lr": 0.03}
"""Adam's rates as a part of SGD's with momentum. Its steps are as large as the rate, and blocks begin with zeros."""
_RATES = tuple(_ADAM)
_ADAM_WARMUP = 0.3
"""Adam's first steps are as long as the rate, however small the gradient; nine steps without this lost 5 points."""
_DEPENDENT, _DEPENDENT_RATE = 0.005, 10.0
"""From which dependence on the blocks' rate is how many times the backbone's; recipes/README.md has the figures."""
_SHARES = ("gates_share", "warmup_share", "min_lr_share", "smoothing", "distill", "hflip", "vflip", "erase", "ema")
_BELOW_ONE = {"ema": "the average never moves", "smoothing": "no label is left"}
_AT_MOST = {"epochs": 1_000_000, "seed": 2**31 - 1, "workers": 1024}
_KEYS = {f.name: f for f in fields(Recipe)}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of YAML 1.2, which refuses a key that is given twice.

    YAML 1.1 takes 010 for 8, 1:30 for 90, and 1e-3 for a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(problem=f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def _set_number(kind: type[int] | type[float], pattern: str) -> None:
    """Let the loader read numbers of a kind where a pattern matches, and nowhere else."""

    def construct(_: _Loader, node: yaml.ScalarNode) -> float:
        return kind(node.value.replace(".inf", "inf").replace(".nan", "nan"))

    tag = f"tag:yaml.org,2002:{kind.__name__}"
    others = _Loader.yaml_implicit_resolvers.items()
    _Loader.yaml_implicit_resolvers = {first: [(t, p) for t, p in found if t != tag] for first, found in others}
    _Loader.add_implicit_resolver(tag, re.compile(pattern), [*"-+.0123456789"])
    _Loader.add_constructor(tag, construct)


_set_number(int, r"^[-+]?[0-9]+$")
_set_number(float, r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$")


def read_recipe(name: str = DEFAULT_RECIPE, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with overrides as in `lr=0.01`.

    Args:
        name: One of ours (`list_recipes`), or a YAML file.
        overrides: `KEY=VALUE` each, with the value written as in YAML.

    Raises:
        RecipeError: There is no such recipe, or keys and values of it are wrong; all are listed.

    Example:
        >>> read_recipe("short", ["lr=0.02"]).lr
        0.02
    """
    path = find_recipe(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  a safe one
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if values is None:
        raise RecipeError(f"the recipe {path} is empty; expected lines of KEY: VALUE")
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds a {type(values).__name__}; expected lines of KEY: VALUE")
    values = dict(values)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--set {override!r} has no =; expected KEY=VALUE")
            continue
        try:
            values[key.strip()] = yaml.load(text, _Loader)  # noqa: S506  a safe one
        except (yaml.YAMLError, ValueError):
            problems.append(f"{key.strip()} is {text!r}, which is no YAML value")
    return make_recipe(
        values, origin=" ".join([str(path), *(["with"] if overrides else []), *overrides]), problems=problems
    )


def make_recipe(values: Mapping[str, Any], *, origin: str = "the recipe", problems: Sequence[str] = ()) -> Recipe:
    """Check the values of a recipe; what is not given has its default.

    Raises:
        RecipeError: Keys or values are wrong; all are listed.
    """
    found = [*problems]
    hints = get_type_hints(Recipe)
    read = {}
    for key, value in values.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            found.append(f"unknown key {key!r}" + (f", did you mean {near[0]}?" if near else ""))
            continue
        try:
            read[key] = _convert(value, hints[key])
        except ValueError as error:
            found.append(f"{key} is {value!r}; expected {error}")
    found += [
        f"{key} is {read[key]!r}; expected {what}" for key, what in (*_find_out_of_range(read), *_find_unusable(read))
    ]
    if found:
        raise RecipeError(f"{origin}: {'; '.join(found)}")
    if "optimizer" in read:
        read["optimizer"] = read["optimizer"].lower()  # as timm does
    return Recipe(**read)


def list_recipes() -> dict[str, Path]:
    """List our recipes by name; they are found in a checkout and in an installed package."""
    folder = next((f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Find the file of a recipe.

    Raises:
        RecipeError: There is none.
    """
    own = list_recipes()
    path = Path(name)
    if name in own:
        return own[name]
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise RecipeError(f"there is no recipe {name!r}; expected {', '.join(own)}, or a .yaml file (copy one of ours)")


def _convert(value: object, kind: Any) -> Any:
    """Convert a YAML value; the error says what was expected."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ValueError("two numbers, as in [0.5, 1.0]")
        return tuple(_convert(item, float) for item in value)
    if kind in (str, bool):
        if not isinstance(value, kind):
            raise ValueError("a word" if kind is str else "true or false")
        return value
    return _convert_number(value, kind)


def _convert_number(value: object, kind: type[int] | type[float]) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a number")
    if kind is int and value != int(value):
        raise ValueError("a whole number")
    return kind(value)


def _find_out_of_range(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if key in _POSITIVE and value <= 0:
            yield key, "a number above 0"
        elif key in _SHARES and not 0 <= value <= 1:
            yield key, "a number from 0 to 1"
        elif key in ("scale", "ratio"):
            if not 0 < value[0] <= value[1] or (key == "scale" and value[1] > 1):
                yield key, "two numbers above 0, the smaller first" + (", at most 1" if key == "scale" else "")
        elif isinstance(value, (int, float)) and value < 0:
            yield key, "a number of at least 0"


def _find_unusable(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, what in _BELOW_ONE.items():
        if values.get(key) == 1:
            yield key, f"a number below 1; at 1 {what}"
    for key, most in _AT_MOST.items():
        if values.get(key, 0) > most:
            yield key, f"a number of at most {most:,}"
    if values.get("batch_size", 2) % 2 and (values.get("mixup") or values.get("cutmix")):
        yield "batch_size", "an even number with mixup or cutmix, which mix pairs"
    if values.get("auto_augment") and not _knows_augmentation(values["auto_augment"]):
        yield "auto_augment", "what timm's auto_augment_transform takes, as in rand-m9-mstd0.5"
    if "optimizer" in values and not _knows_optimizer(values["optimizer"]):
        yield "optimizer", "auto or a name of timm.optim.list_optimizers() that takes first derivatives alone"


def _knows_augmentation(name: str) -> bool:
    try:
        make = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}.get(name[:4], auto_augment_transform)
        make(name, {"translate_const": 1, "img_mean": (0, 0, 0)})
    except (AssertionError, ValueError, KeyError, IndexError):
        return False
    return True


def _knows_optimizer(name: str) -> bool:
    name = name.lower()
    return name == "auto" or (name in list_optimizers() and not get_optimizer_info(name).second_order)
