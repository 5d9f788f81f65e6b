"""Adapters: the blocks alone, as a small file that goes onto any copy of the network that they were tuned for.

Takes an injected network whose own weights stayed as they were (the recipe se_only), gives a file of the blocks'
tensors and the plan; and puts such files onto the network again, several in turn. A digest of the network's weights
says whether it is the right one. No code comes from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.attention import find_recipe
from se_inject.block import GAIN, SqueezeExcite
from se_inject.ejection import eject
from se_inject.errors import ArtifactError, ModelError, OptionError, PlanError
from se_inject.files import check_suffix, read_values, write_tensors
from se_inject.gates import swap_blocks
from se_inject.marks import ADAPTERS, SOURCE, find_mark, mark_module
from se_inject.plan import Plan
from se_inject.rewrite import blocks, find_plan, get_plan, inject

FORMAT = "se-inject adapter"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Adapter:
    """The blocks of a network.

    Attributes:
        plan: Where they stand.
        state: Their tensors, by the names that they have in the network's state dict.
        gains: Of the blocks whose gain is not the usual one.
        digest: Of the network that they belong to.
    """

    plan: Plan
    state: Mapping[str, Tensor]
    gains: Mapping[str, float]
    digest: str


def compute_digest(model: nn.Module) -> str:
    """Compute a digest of a network without its blocks: of the names, types, shapes and values of its state dict.

    The order does not matter, nor do devices and memory formats.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18()
        >>> compute_digest(inject(model)) == compute_digest(model)
        True
    """
    inside = tuple(f"{path}." for path in blocks(model))
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not (inside and name.startswith(inside)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    return Adapter(plan, state, gains, compute_digest(model))


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the blocks of a network alone: their tensors and the plan, and a digest of the rest.

    Args:
        model: From `inject` or `load`, tuned with its own weights frozen; else the digest is of weights that nobody
            else has, and the adapter fits this network alone.
        path: `.pt`, `.pth` or `.safetensors`.

    Raises:
        ModelError: The model has not been injected, or its blocks were made by a factory.
        ArtifactError: The file cannot be written.

    Example:
        >>> save_adapter(model, "birds.safetensors")  # doctest: +SKIP
    """
    target = Path(path)
    check_suffix(target)
    adapter = get_adapter(model)
    try:
        find_recipe(adapter.plan.block)
    except OptionError as error:
        raise ModelError(
            f"the blocks were made by {adapter.plan.block}, which no file may name; save the whole network"
        ) from error
    values = {
        "format": FORMAT, "version": FORMAT_VERSION, "plan": json.loads(adapter.plan.to_json()),
        "gains": dict(adapter.gains), "digest": adapter.digest,
    }  # fmt: skip
    write_tensors(target, adapter.state, values)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter; nothing in the file is executed.

    Raises:
        ArtifactError: There is no such file, or it is no adapter, or of a newer version.
        PlanError: Its plan is none.
    """
    values = read_values(Path(path))
    if values.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no adapter of se-inject; a whole network is read by load")
    version = values.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(f"{path} has version {version}, this se-inject reads up to {FORMAT_VERSION}: upgrade it")
    state, gains, digest = (values.get(key) for key in ("state_dict", "gains", "digest"))
    is_whole = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
    has_gains = isinstance(gains, dict) and all(isinstance(gain, float) for gain in gains.values())
    if not (is_whole and has_gains and isinstance(digest, str)):
        raise ArtifactError(f"{path} is no whole adapter: it has {', '.join(map(str, values))}")
    return Adapter(Plan.from_json(json.dumps(values.get("plan"))), state, gains, digest)  # type: ignore[arg-type]


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
        ModelError: The network has blocks that are no adapter.

    Example:
        >>> model = load_adapter(network, "birds.safetensors", name="birds")  # doctest: +SKIP
    """
    adapter = read_adapter(path)
    known = list_adapters(model)
    if find_plan(model) is not None and not known:
        raise ModelError(f"{type(model).__name__} has blocks of its own; load an adapter onto the network without them")
    if strict and adapter.digest != compute_digest(model):
        raise ArtifactError(
            f"{path} was made for a {adapter.plan.model} with other weights than this {type(model).__name__} has; give "
            f"it the original's weights, or load with strict=False"
        )
    plain = model if find_plan(model) is None else eject(model)
    try:
        made = inject(plain, plan=adapter.plan)  # a copy, on which all that can fail happens
        _check(made, adapter)
    except (PlanError, OptionError) as error:
        raise ArtifactError(f"{path} is of another network: {error}") from error
    return _put_on(model if inplace else made, {**known, name: adapter}, name, source=find_mark(model, SOURCE))


def list_adapters(model: nn.Module) -> dict[str, Adapter]:
    """List the adapters that a network has, by name."""
    found = find_mark(model, ADAPTERS)
    return dict(found) if isinstance(found, dict) else {}


def set_adapter(model: nn.Module, name: str) -> None:
    """Change to another of the adapters that a network has, in place. What the blocks had learned since is lost.

    Raises:
        OptionError: It has no such adapter.
    """
    known = list_adapters(model)
    if name not in known:
        raise OptionError(f"there is no adapter {name!r}; the network has {', '.join(map(repr, known)) or 'none'}")
    _put_on(model, known, name, source=find_mark(model, SOURCE))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run a network without its blocks, for as long as the context lasts: the original's outputs, bit for bit."""
    with swap_blocks(model, {path: _Bypass() for path in blocks(model)}):
        yield


class _Bypass(nn.Module):
    """Stands in the place of a block, and does nothing."""

    def forward(self, *maps: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if shortcut is not None:
            return maps[0] + shortcut
        return maps[0] if len(maps) == 1 else maps


def _put_on(model: nn.Module, adapters: Mapping[str, Adapter], name: str, *, source: object) -> nn.Module:
    """Give a network the blocks of an adapter that is known to fit it."""
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
