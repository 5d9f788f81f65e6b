"""Adapters: the blocks alone, as a small file that goes onto any copy of the network that they were tuned for.

Takes an injected network whose own weights stayed as they were (the recipe se_only), gives a file of the blocks'
tensors and the plan; and puts such files onto the network again, several in turn. A digest of the network's weights
says whether it is the right one. No code comes from the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from se_inject.attention import find_recipe
from se_inject.block import GAIN, SqueezeExcite
from se_inject.claims import check_weights
from se_inject.ejection import eject
from se_inject.errors import ArtifactError, ModelError, OptionError, PlanError
from se_inject.files import check_suffix
from se_inject.marks import ADAPTERS, SOURCE, find_mark, mark_module
from se_inject.plan import Plan
from se_inject.records import compute_digest, read_record, write_record
from se_inject.rewrite import blocks, find_plan, get_plan, inject, refuse_empty, refuse_lost, refuse_optimized

FORMAT = "se-inject adapter"


@dataclass(frozen=True)
class Adapter:
    """The blocks of a network.

    Attributes:
        plan: Where they stand.
        state: Their tensors, by the names that they have in the network's state dict.
        gains: Of the blocks whose gain is not the usual one.
        base: The digest of the network that they belong to.
    """

    plan: Plan
    state: Mapping[str, Tensor]
    gains: Mapping[str, float]
    base: str


def compute_fingerprint(model: nn.Module) -> str:
    """Compute a digest of a network without its blocks: of the names, types, shapes and values of its state dict.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18()
        >>> compute_fingerprint(inject(model)) == compute_fingerprint(model)
        True
    """
    inside = tuple(f"{path}." for path in blocks(model))
    own = {k: v for k, v in model.state_dict().items() if not (inside and k.startswith(inside))}
    return compute_digest(own)


def get_adapter(model: nn.Module) -> Adapter:
    """Take down the blocks that a network has now; later changes to the network do not change it.

    Raises:
        ModelError: The network has not been injected.
    """
    plan = get_plan(model)
    own = blocks(model)
    inside = tuple(f"{path}." for path in own)
    state = {k: v.detach().clone() for k, v in model.state_dict().items() if inside and k.startswith(inside)}
    gains = {p: block.gain for p, block in own.items() if isinstance(block, SqueezeExcite) and block.gain != GAIN}
    return Adapter(plan, state, gains, compute_fingerprint(model))


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the blocks of a network alone: their tensors and the plan, and a digest of the rest.

    Args:
        model: From `inject` or `load`, tuned with its own weights frozen; else the digest is of weights that nobody
            else has, and the adapter fits this network alone.
        path: `.pt`, `.pth` or `.safetensors`.

    Raises:
        ModelError: The model has not been injected, has lost a block or has none, or its blocks were made by a factory.
        ArtifactError: The file cannot be written.

    Example:
        >>> save_adapter(model, "birds.safetensors")  # doctest: +SKIP
    """
    target = Path(path)
    check_suffix(target)
    adapter = get_adapter(model)
    refuse_empty(model)
    refuse_lost(model)
    try:
        find_recipe(adapter.plan.block)
    except OptionError as error:
        raise ModelError(
            f"the blocks were made by {adapter.plan.block}, which no file may name; save the whole network"
        ) from error
    values = {"plan": json.loads(adapter.plan.to_json()), "gains": dict(adapter.gains), "base": adapter.base}
    write_record(target, FORMAT, values, adapter.state)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter; nothing in the file is executed.

    Raises:
        ArtifactError: There is no such file, or it is no adapter, or of a newer version.
        PlanError: Its plan is none.
    """
    needs = frozenset({"plan", "gains", "base"})
    values, state = read_record(Path(path), FORMAT, "a whole network is read by load", needs=needs)
    gains, base = values["gains"], values["base"]
    has_gains = isinstance(gains, dict) and all(isinstance(gain, float) for gain in gains.values())
    if not (has_gains and isinstance(base, str)):
        raise ArtifactError(f"{path} is no whole adapter: its gains or its base are none")
    plan = Plan.from_json(json.dumps(values["plan"]))
    check_weights(plan.num_parameters, state, Path(path))
    return Adapter(plan, {k: v.clone() for k, v in state.items()}, gains, base)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    strict: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Put an adapter onto the network that it was made for, and use it; `set_adapter` changes to another one.

    Args:
        model: The network without blocks, or with other adapters.
        path: What `save_adapter` wrote.
        name: By which it is known from now on.
        strict: Refuse a network whose own weights are others than those that the blocks were tuned with.
        inplace: Change the given model, instead of a copy.

    Raises:
        ArtifactError: The file is no adapter, or is of another network.
        ModelError: The network has blocks that are no adapter, or they are disabled and are to be changed in place.

    Example:
        >>> model = load_adapter(network, "birds.safetensors", name="birds")  # doctest: +SKIP
    """
    adapter = read_adapter(path)
    known = list_adapters(model)
    if find_plan(model) is not None and not known:
        raise ModelError(f"{type(model).__name__} has blocks of its own; load an adapter onto the network without them")
    if strict and adapter.base != compute_fingerprint(model):
        error = ArtifactError(
            f"{path} was made for a {adapter.plan.model} with other weights than this {type(model).__name__} has; give "
            f"it the original's weights"
        )
        error.add_note("load_adapter(..., strict=False) takes others")  # the command line, which cannot, shows no notes
        raise error
    plain = model if find_plan(model) is None else eject(model)
    try:
        made = inject(plain, plan=adapter.plan)  # a copy, on which all that can fail happens
        _check(made, adapter)
    except (PlanError, OptionError) as error:
        raise ArtifactError(f"{path} is of another network: {error!s:.400}") from error
    return _put_on(model if inplace else made, {**known, name: adapter}, name, source=find_mark(model, SOURCE))


def list_adapters(model: nn.Module) -> dict[str, Adapter]:
    """List the adapters that a network has, by name."""
    found = find_mark(model, ADAPTERS)
    return dict(found) if isinstance(found, dict) else {}


def set_adapter(model: nn.Module, name: str) -> None:
    """Change to another of the adapters that a network has, in place. What the blocks had learned since is lost.

    Raises:
        ModelError: It is optimized, or its adapters are disabled.
        OptionError: It has no such adapter.
    """
    refuse_optimized(model)
    known = list_adapters(model)
    if name not in known:
        raise OptionError(f"there is no adapter {name!r}; the network has {', '.join(map(repr, known)) or 'none'}")
    _put_on(model, known, name, source=find_mark(model, SOURCE))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run a network without its blocks, for as long as the context lasts: the original's outputs, bit for bit.

    The blocks stay where they are: what is saved meanwhile has them, and a copy that is made meanwhile runs with them.
    Another adapter cannot be put on.

    Raises:
        ModelError: It is optimized.
    """
    refuse_optimized(model)
    # Those that an outer context bypasses are left to it.
    bypasses = [_Bypass(block) for block in blocks(model).values() if not _is_bypassed(block)]
    try:
        for bypass in bypasses:
            bypass.begin()
        yield
    finally:
        for bypass in bypasses:
            bypass.end()


class _Bypass:
    """Takes the place of a block's forward, and does nothing to its maps."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._shadowed = {name: value for name, value in vars(block).items() if name == "forward"}

    def begin(self) -> None:
        vars(self._block)["forward"] = self

    def end(self) -> None:
        if _is_bypassed(self._block):
            del vars(self._block)["forward"]
            vars(self._block).update(self._shadowed)

    def __call__(self, *maps: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if shortcut is not None:
            return maps[0] + shortcut
        return maps[0] if len(maps) == 1 else maps

    def __reduce__(self) -> tuple[Any, ...]:
        """Become the own forward of a block's copy, or pickle: nothing would end the bypass there."""
        return getattr, (self._block, "forward")


def _is_bypassed(block: nn.Module) -> bool:
    return isinstance(vars(block).get("forward"), _Bypass)


def _put_on(model: nn.Module, adapters: Mapping[str, Adapter], name: str, *, source: object) -> nn.Module:
    """Give a network the blocks of an adapter that is known to fit it.

    Raises:
        ModelError: Its blocks are disabled.
    """
    if any(map(_is_bypassed, blocks(model).values())):
        raise ModelError(f"the blocks of {type(model).__name__} are disabled; leave disable_adapters, then change them")
    adapter = adapters[name]
    if find_plan(model) != adapter.plan:
        if find_plan(model) is not None:
            eject(model, inplace=True)
        inject(model, plan=adapter.plan, inplace=True)
    for path, block in blocks(model).items():
        block.load_state_dict(_select(adapter, path))
        if isinstance(block, SqueezeExcite):
            block.gain = adapter.gains.get(path, GAIN)
    mark_module(model, ADAPTERS, dict(adapters))
    if source is not None:
        mark_module(model, SOURCE, source)
    return model


def _check(model: nn.Module, adapter: Adapter) -> None:
    own = blocks(model)
    expected = {f"{path}.{name}": value for path, block in own.items() for name, value in block.state_dict().items()}
    wrong = [k for k in {**expected, **adapter.state} if _get_shape(expected, k) != _get_shape(adapter.state, k)]
    if wrong or not set(adapter.gains) <= set(own):
        raise PlanError(f"its tensors are not those of the {len(own)} blocks of its plan ({', '.join(wrong[:3])})")


def _get_shape(tensors: Mapping[str, Any], name: str) -> object:
    return tuple(tensors[name].shape) if name in tensors else None


def _select(adapter: Adapter, path: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{path}."): v for k, v in adapter.state.items() if k.startswith(f"{path}.")}
