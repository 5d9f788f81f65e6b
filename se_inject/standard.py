"""Standard form: fold the gain of every block into the layer before it, which leaves the plain sigmoid block.

Takes an injected model, gives the same function with `gain` 1. As the block scales what it squeezes,
`gain * sigmoid(W2 relu(W1 mean(y) + b1) + b2) * y` is `sigmoid(W2 relu(W1' mean(y') + b1) + b2) * y'` with
`y' = gain * y` and `W1' = W1 / gain`; where y comes from an activation such as SiLU, the weight of the layer that reads
the block's output takes the gain instead. A gain of 2 changes exponents alone, so the outputs stay equal to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from se_inject.block import SqueezeExcite
from se_inject.calls import Entry, decode_call
from se_inject.errors import StandardFormError, TraceError
from se_inject.plan import Plan
from se_inject.rewrite import blocks, copy_model, get_plan
from se_inject.scaling import Scale, UnreachableError, find_reader, find_scale
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin, make_twin, quiet, set_training

_FOLDABLE_GATES = ("sigmoid", "hard_sigmoid")


@dataclass(frozen=True)
class Fold:
    """A block whose gain can go into the layers before it, or into the one after it."""

    block: str
    parameters: tuple[str, ...]
    """Full names of the parameters that take the gain, as `layer1.0.bn3.weight`."""
    is_after: bool = False
    """Whether they are those of the layer that reads the block's output, and not of those that make its maps."""


@dataclass(frozen=True)
class StandardForm:
    """What `standardize` will do: a fold a block, and the blocks that keep their gain, with the reasons.

    Blocks whose gain is 1 already are in neither.
    """

    folds: tuple[Fold, ...]
    kept: Mapping[str, str]


def standardize(model: nn.Module, *, strict: bool = True, inplace: bool = False) -> nn.Module:
    """Give every block the gain 1, the form of the paper, without changing what the network computes.

    The affine layers that make a block's maps (the weight and bias of the last norm, or of the last convolution or
    linear layer where there is none) are multiplied by the gain, W1 is divided by it. With the gain that `inject`
    gives, 2, the outputs are equal to the bit in eval and in train mode; the maps between those layers and the block
    are twice what they were. An optimizer's state of before does not fit the result.

    Args:
        model: From `inject` or `load`, trained or not.
        strict: Refuse if a block has no standard form. Otherwise such a block keeps its gain (`block.gain` tells), and
            `find_standard_form` says why.
        inplace: Change the given model, instead of a copy.

    Raises:
        ModelError: The model has not been injected.
        StandardFormError: `strict`, and the gain of a block cannot be folded: another operation uses its map too, its
            maps pass through or come from an activation such as SiLU, or a layer is shared.

    Example:
        >>> import torchvision
        >>> model = standardize(inject(torchvision.models.resnet18()))
        >>> {block.gain for block in blocks(model).values()}
        {1.0}
    """
    form = find_standard_form(model)
    if strict and form.kept:
        first, reason = next(iter(form.kept.items()))
        more = f", and {len(form.kept) - 1} more" if len(form.kept) > 1 else ""
        raise StandardFormError(
            f"{len(form.kept)} of {len(blocks(model))} blocks have no standard form ({first}: {reason}{more}); "
            f"strict=False lets them keep their gain, exclude= leaves them out when injecting"
        )
    target = model if inplace else copy_model(model)
    with torch.no_grad():
        for fold in form.folds:
            block = cast("SqueezeExcite", target.get_submodule(fold.block))
            for name in fold.parameters:
                target.get_parameter(name).mul_(block.gain)
            if not fold.is_after:
                block.fc1.weight.div_(block.gain)
            block.gain = 1.0
    return target


def find_standard_form(model: nn.Module) -> StandardForm:
    """Find out for each block which parameters can take its gain; the model is neither run nor changed.

    Raises:
        ModelError: The model has not been injected.

    Example:
        >>> import torchvision
        >>> form = find_standard_form(inject(torchvision.models.resnet18()))
        >>> form.folds[0]
        Fold(block='layer1.0.se', parameters=('layer1.0.bn2.bias', 'layer1.0.bn2.weight'), is_after=False)
    """
    plan = get_plan(model)
    twin = make_twin(model)
    present = blocks(model)
    calls = _count_calls(twin, plan)
    folds: list[Fold] = []
    kept: dict[str, str] = {}
    for entry, sites in plan.iterate_entries():
        waiting = {site.path: site.name for site in sites if _has_gain(present.get(site.path))}
        try:
            traces = _trace(twin, plan, entry) if waiting else []
        except TraceError as error:
            kept |= dict.fromkeys(waiting, f"its owner's code cannot be followed: {error}")
            continue
        for path, name in waiting.items():
            with _noting(kept, path):
                _check_gate(present[path])
                names, is_after = _find_parameters(twin, traces, name)
                _check_sharing(model, path, names, calls)
                folds.append(Fold(path, tuple(sorted(names)), is_after))
    return _refuse_double_folds(StandardForm(tuple(folds), kept))


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


def _find_parameters(twin: Twin, traces: Sequence[Trace], name: str) -> tuple[frozenset[str], bool]:
    """Find the parameters that scale all maps of a block, or else its output, the same ones in every mode.

    Returns:
        Their names, and whether they are those of the layer after the block.
    """
    blocks_in = [_find_block(trace, name) for trace in traces]
    is_after = False
    try:
        found = {_find_before(twin, trace, node) for trace, node in zip(traces, blocks_in, strict=True)}
    except UnreachableError as error:
        if any(node.kwargs for node in blocks_in):
            raise error from None  # the factor would be in a sum
        try:
            found = {find_reader(twin, trace, node).parameters for trace, node in zip(traces, blocks_in, strict=True)}
        except UnreachableError:
            raise error from None
        is_after = True
    if len(found) > 1:
        raise UnreachableError("its maps come from other layers in train than in eval mode")
    return found.pop(), is_after


def _find_block(trace: Trace, name: str) -> fx.Node:
    nodes: list[fx.Node] = [n for n in trace.graph.nodes if n.op == "call_module" and n.target == name]
    if len(nodes) != 1:
        raise UnreachableError(f"it is called {len(nodes)} times in its owner's code")
    return nodes[0]


def _find_before(twin: Twin, trace: Trace, block: fx.Node) -> frozenset[str]:
    maps = [node for node in block.args if isinstance(node, fx.Node)]
    scale = Scale(frozenset())
    for node in maps:
        scale |= find_scale(twin, trace, node, block)
    if scale.arguments:
        raise UnreachableError(f"`{min(scale.arguments)}` is what its owner is handed, not the output of a layer")
    return scale.parameters


def _has_gain(block: nn.Module | None) -> bool:
    return block is not None and not (isinstance(block, SqueezeExcite) and block.gain == 1)


def _check_gate(block: nn.Module) -> None:
    if not isinstance(block, SqueezeExcite):
        raise UnreachableError(f"it is a {type(block).__name__} and not a squeeze-and-excitation block of ours")
    if block.gate not in _FOLDABLE_GATES:
        raise UnreachableError(f"its gate is {block.gate!r}, not a sigmoid")
    if not block.gain > 0:
        raise UnreachableError(f"its gain is {block.gain:g}, which is not positive")


def _check_sharing(model: nn.Module, path: str, names: frozenset[str], calls: Mapping[str, int]) -> None:
    """Refuse layers that something else runs as well: a parameter of two layers, a layer of two owners."""
    aliases: Counter[int] = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = aliases[id(model.get_parameter(f"{path}.fc1.weight"))]
    for name in sorted(names):
        if aliases[id(model.get_parameter(name))] != own:
            raise UnreachableError(f"{name} is shared with another layer")
        holder = name.rpartition(".")[0]
        if calls and calls.get(holder) != calls.get(path):
            raise UnreachableError(
                f"{holder} runs {calls.get(holder, 0)} times where its block runs {calls[path]} times"
            )


def _count_calls(twin: Twin, plan: Plan) -> Mapping[str, int]:
    """Count how often each module runs in one pass over fake tensors; empty where the course depends on the data."""
    counts: Counter[str] = Counter()

    def count(path: str) -> None:
        counts[path] += 1

    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: count(path))
        for path, module in twin.model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    call = decode_call(plan.calls[Entry("").key], twin)
    complete = False
    try:
        with suppress(Exception), set_training(twin.model, False), quiet(), torch.no_grad(), twin.mode:
            twin.model(*tree_map(_clone, call.args), **tree_map(_clone, call.kwargs))
            complete = True
    finally:
        for hook in hooks:
            hook.remove()
    return counts if complete else {}


def _clone(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _refuse_double_folds(form: StandardForm) -> StandardForm:
    """Keep the gain of blocks that would scale the same parameter."""
    uses = Counter(name for fold in form.folds for name in fold.parameters)
    kept = dict(form.kept)
    folds = []
    for fold in form.folds:
        shared = [name for name in fold.parameters if uses[name] > 1]
        if shared:
            kept[fold.block] = f"{shared[0]} makes the maps of another block too"
        else:
            folds.append(fold)
    return StandardForm(tuple(folds), kept)
