"""A recipe's values: each checked against what it may be.

Takes plain values by key, as YAML gives them, gives a `Recipe`, or one error that lists all that is wrong.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.optim import get_optimizer_info, list_optimizers

from se_inject.errors import RecipeError
from se_inject.recipe import Recipe

_POSITIVE = ("epochs", "batch_size", "temperature", "checkpoint_minutes")
_SHARES = ("gates_share", "warmup_share", "min_lr_share", "smoothing", "distill", "hflip", "vflip", "erase", "ema")
_BELOW_ONE = {"ema": "the average never moves", "smoothing": "no label is left"}
_AT_MOST = {"epochs": 1_000_000, "seed": 2**31 - 1, "workers": 1024}
_MOST = 1e38
"""Of all other numbers: torch cannot hand on what is too large for a tensor's type."""


def make_recipe(values: Mapping[str, Any], *, origin: str = "the recipe", problems: Sequence[str] = ()) -> Recipe:
    """Check the values of a recipe; what is not given has its default.

    Raises:
        RecipeError: Keys or values are wrong; all are listed.
    """
    found = [*problems]
    hints = get_type_hints(Recipe)
    read = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
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
    for key, value in values.items():
        largest, what = (max(value), "numbers") if isinstance(value, tuple) else (value, "a number")
        if isinstance(largest, (int, float)) and largest > (most := _AT_MOST.get(key, _MOST)):
            yield key, f"{what} of at most {most:,}"
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
