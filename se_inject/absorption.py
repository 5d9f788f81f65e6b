"""Absorption: find the parameters that can take a factor off a block, so that its gate need not have it.

Takes an injected model and some of its blocks, gives for each the parameters of the layers that make its maps, or of
the layer that reads its output, or the reason why there are none. Neither runs nor changes the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from se_inject.calls import Entry, decode_call
from se_inject.errors import TraceError
from se_inject.folding import has_hooks
from se_inject.plan import Plan
from se_inject.rewrite import blocks, get_plan
from se_inject.scaling import Scale, Search, UnreachableError, find_reader, find_scale
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin, apart, make_twin, set_training


@dataclass(frozen=True)
class Fold:
    """A block whose factor can go into the layers before it, or into the one after it."""

    block: str
    maps: tuple[tuple[str, ...], ...]
    """Full names of the parameters, as `layer1.0.bn3.weight`, for each of the block's maps."""
    channels: tuple[int, ...] = ()
    """Of each of these maps."""
    is_after: bool = False
    """Whether they are those of the layer that reads the block's output, and not of those that make its maps."""

    @property
    def parameters(self) -> list[str]:
        """All of them."""
        return sorted(name for names in self.maps for name in names)


@dataclass(frozen=True)
class Folds:
    """A fold a block, and the blocks that have none, with the reasons."""

    folds: tuple[Fold, ...]
    kept: Mapping[str, str]


def find_folds(
    model: nn.Module, paths: Collection[str], check: Callable[[nn.Module], None], *, is_channelwise: bool = False
) -> Folds:
    """Find out for some blocks which parameters can take a factor; the model is neither run nor changed.

    Args:
        model: An injected model.
        paths: Those of the blocks.
        check: Raises `UnreachableError` for a block that has no such factor.
        is_channelwise: Whether each channel has a factor of its own.

    Raises:
        ModelError: The model has not been injected.
    """
    plan = get_plan(model)
    search = Search(make_twin(model), is_channelwise)
    present = blocks(model)
    uses = _count_uses(search.twin, plan)
    folds: list[Fold] = []
    kept: dict[str, str] = {}
    for entry, sites in plan.iterate_entries():
        waiting = {site.path: site.name for site in sites if site.path in paths}
        try:
            traces = _trace(search.twin, plan, entry) if waiting else []
        except TraceError as error:
            kept |= dict.fromkeys(waiting, f"its owner's code cannot be followed: {error}")
            continue
        for path, name in waiting.items():
            with _noting(kept, path):
                check(present[path])
                if has_hooks(present[path]):
                    raise UnreachableError("it has a hook")
                fold = _find_fold(search, traces, path, name)
                _check_sharing(model, path, fold.parameters, uses)
                folds.append(fold)
    return _refuse_double_folds(Folds(tuple(folds), kept))


@contextmanager
def _noting(kept: dict[str, str], path: str) -> Iterator[None]:
    try:
        yield
    except UnreachableError as error:
        kept[path] = str(error)


def _trace(twin: Twin, plan: Plan, entry: Entry) -> list[Trace]:
    """Trace an owner as it is now, with its blocks, in both modes: a child may have a code for each, as drop path."""
    call = decode_call(plan.calls[entry.key], twin)
    return [trace_entry(twin, entry, call, training=training) for training in (False, True)]


def _find_fold(search: Search, traces: Sequence[Trace], path: str, name: str) -> Fold:
    """Find the parameters that scale all maps of a block, or else its output, the same ones in every mode."""
    blocks_in = [_find_block(trace, name) for trace in traces]
    is_after = False
    try:
        found = {_find_before(search, trace, node) for trace, node in zip(traces, blocks_in, strict=True)}
    except UnreachableError as error:
        if any(node.kwargs for node in blocks_in):
            raise error from None  # the factor would be in a sum
        try:
            after = {find_reader(search, trace, node).parameters for trace, node in zip(traces, blocks_in, strict=True)}
            found = {(names,) for names in after}
        except UnreachableError:
            raise error from None
        is_after = True
    if len(found) > 1:
        raise UnreachableError("its maps come from other layers in train than in eval mode")
    maps = tuple(tuple(sorted(names)) for names in found.pop())
    dim = getattr(search.twin.model.get_submodule(path), "channel_dim", 1)
    channels = [node.meta["value"].shape[dim] for node in blocks_in[0].args if isinstance(node, fx.Node)]
    return Fold(path, maps, (sum(channels),) if is_after else tuple(channels), is_after)


def _find_block(trace: Trace, name: str) -> fx.Node:
    nodes: list[fx.Node] = [n for n in trace.graph.nodes if n.op == "call_module" and n.target == name]
    if len(nodes) != 1:
        raise UnreachableError(f"it is called {len(nodes)} times in its owner's code")
    return nodes[0]


def _find_before(search: Search, trace: Trace, block: fx.Node) -> tuple[frozenset[str], ...]:
    scales = [find_scale(search, trace, node, block) for node in block.args if isinstance(node, fx.Node)]
    whole = Scale(frozenset())
    for scale in scales:
        whole |= scale
    if whole.arguments:
        raise UnreachableError(f"`{min(whole.arguments)}` is what its owner is handed, not the output of a layer")
    return tuple(scale.parameters for scale in scales)


def _check_sharing(model: nn.Module, path: str, names: Sequence[str], uses: _Uses | None) -> None:
    """Refuse layers that something else runs as well: a parameter of two layers, a layer of two owners."""
    aliases: Counter[int] = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = aliases[id(model.get_parameter(f"{path}.fc1.weight"))]
    for name in names:
        if aliases[id(model.get_parameter(name))] != own:
            raise UnreachableError(f"{name} is shared with another layer")
        if uses is None:
            continue
        holder, runs = name.rpartition(".")[0], uses.calls[path]
        if uses.calls[holder] != runs:
            raise UnreachableError(f"{holder} runs {uses.calls[holder]} times where its block runs {runs} times")
        if uses.reads[name] > runs:
            raise UnreachableError(f"{name} is read by other code too")


class _Uses(TorchFunctionMode):
    """How often each module of a network runs, and each parameter is handed to a function that makes a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):
            self.reads.update(self._names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self._names)
        return result


def _count_uses(twin: Twin, plan: Plan) -> _Uses | None:
    """Count them in one pass over fake tensors; None where the course depends on the data."""
    uses = _Uses(twin.model)
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: uses.calls.update([path]))
        for path, module in twin.model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    call = decode_call(plan.calls[Entry("").key], twin)
    try:
        with set_training(twin.model, False), apart(twin.model), torch.no_grad(), twin.mode, uses:
            twin.model(*tree_map(_clone, call.args), **tree_map(_clone, call.kwargs))
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def _clone(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _refuse_double_folds(form: Folds) -> Folds:
    """Leave out blocks that would scale the same parameter."""
    uses = Counter(name for fold in form.folds for name in fold.parameters)
    kept = dict(form.kept)
    folds = []
    for fold in form.folds:
        shared = [name for name in fold.parameters if uses[name] > 1]
        if shared:
            kept[fold.block] = f"{shared[0]} makes the maps of another block too"
        else:
            folds.append(fold)
    return Folds(tuple(folds), kept)
