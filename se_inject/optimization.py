"""Optimization: make a network as fast as it can be where it is only evaluated.

Takes a network with or without blocks, gives a new one of the same class whose batch norms are folded, and whose blocks
run together with the layers around them. What cannot be proved to be safe stays as it is. The model is not changed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from se_inject.block import SqueezeExcite, mark_block
from se_inject.calls import Call, Entry, decode_call, encode_call
from se_inject.codegen import Method, write_method
from se_inject.confirmation import confirm_folds
from se_inject.course import Course, follow_norms
from se_inject.equivalence import find_difference
from se_inject.errors import ModelError, TraceError
from se_inject.examples import find_running, list_calls
from se_inject.faithful import kept_random_state
from se_inject.folding import add_biases, become, find_replaced, fold_norms, make_identity
from se_inject.fused import FusedSqueezeExcite
from se_inject.fusion import Fusion, fuse_blocks
from se_inject.generated import derive_class, has_method, is_narrower
from se_inject.instructions import list_reads_elsewhere
from se_inject.marks import OPTIMIZED, find_mark, mark_module
from se_inject.probe import DATA_DEPENDENT, make_zeros
from se_inject.reparameterization import refuse_merging
from se_inject.rewrite import copy_model, find_plan, forget_values
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin, alone, apart, get_dtype, is_compiled, make_twin, set_training

_TAP = "forward_intermediates"
"""timm's way to read maps between layers."""


@alone()
@torch.inference_mode(False)
def optimize(model: nn.Module, example: object = None, *, kernels: bool = False) -> nn.Module:
    """Make a network faster for evaluation; the outputs stay equal up to rounding.

    Batch norms go into the convolutions before them. A block squeezes through the 1x1 convolution that makes its map
    where that layer's input is narrower, so that its gate is known before the convolution runs; it scales the map, adds
    the shortcut and applies a ReLU in one place; its gain is folded. Where one of these does not apply (a 3x3
    convolution, an activation in between, a joint concatenation), the others are done. The network is of the same class
    and is called as before; it is in eval mode, has no gradients and is not to be trained. Dropout beside a block is
    gone, so that putting it into train mode (Monte Carlo dropout) does nothing.

    What can be folded is seen on the example, and in timm's `forward_intermediates`. Convolutions beside a batch norm
    that did not run (of another domain, say) stay as they are. Where the network takes another course through layers
    that ran (with other arguments, by the image size, by the data), its outputs are not those of the original.

    Args:
        model: From `inject` or `load`, or any other network, with injected ones in it or without. It is not changed.
        example: An input (N, C, H, W), a tuple of arguments, a dict of keyword arguments, or the height and width of
            images; if None, that of the injection, or else one is found.
        kernels: Whether the blocks run the operators of `se_inject.kernels`, which are Triton kernels on a GPU. These
            were tested in Triton's interpreter, compiled for GPUs and never timed on one, which is why they are off by
            default. A block that they do not suit (several maps, channels last in the code, a squeeze to the maximum,
            a convolution of several groups) goes the plain way, as all do under autocast and where gradients are
            wanted.

    Raises:
        ModelError: The network cannot be copied, or is scripted, compiled or optimized already.
        ExampleError: It does not run on the example.

    Example:
        >>> import torchvision
        >>> from se_inject import inject
        >>> optimize(inject(torchvision.models.resnet50())).layer1[0].se
        FusedSqueezeExcite(
          256, 16, relu
          (fc1): Linear(in_features=64, out_features=16, bias=True)
          (fc2): Linear(in_features=16, out_features=256, bias=True)
          (convolution): Conv2d(64, 256, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    if find_optimization(model) is not None:
        raise ModelError(f"{type(model).__name__} is optimized already")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is scripted (TorchScript); optimize first, trace or export after")
    if is_compiled(model):
        raise ModelError("the model is compiled; optimize first (the model before torch.compile), compile after")
    plan = find_plan(model)
    twin = make_twin(model)
    if example is None and plan is not None:
        calls = [decode_call(plan.calls[Entry("").key], twin)]
    else:
        calls = list_calls(twin, example)
    return _optimize(model, twin, calls, kernels=kernels)


@alone()
def optimize_again(model: nn.Module, values: object) -> nn.Module:
    """Optimize a network as another one of its kind was.

    Args:
        model: An injected network; it is not changed.
        values: What `find_optimization` says of the other one.

    Raises:
        PlanError: The values are none of ours.
        ExampleError: The network does not run on what the other one ran on.
    """
    twin = make_twin(model)
    call = decode_call(values, twin)
    kernels = bool(cast("dict[str, object]", values).get("kernels"))
    return _optimize(model, twin, [call], kernels=kernels)


def find_optimization(model: nn.Module) -> object:
    """Return what a network was optimized with, as plain values; None for any other network."""
    return find_mark(model, OPTIMIZED)


def _optimize(model: nn.Module, twin: Twin, calls: Iterable[Call], *, kernels: bool) -> nn.Module:
    _drop_gradients(twin.model)
    run = functools.partial(_follow, model, twin)
    call, course = find_running(model, calls, run, hint="give an input of the shape that it is used on")
    add_biases(twin.model, course.folds)
    surgeries = _prepare(twin, course)
    target = copy_model(model, find_replaced(model, course.folds)).eval()
    add_biases(target, course.folds)
    fold_norms(target, course.folds)
    _drop_gradients(target)
    for fold in course.folds:
        refuse_merging(target, fold.norm, "would merge norms that are folded", "optimize")
    for surgery in surgeries:
        surgery.perform(target, kernels=kernels)
    options = {"kernels": True} if kernels else {}
    for module in target.modules():  # injected ones in it, which are not to be worked on either
        if module is not target and (plan := find_plan(module)) is not None:
            mark_module(module, OPTIMIZED, {**plan.calls[Entry("").key], **options})
    mark_module(target, OPTIMIZED, {**encode_call(call, get_dtype(target)), **options})
    return target


def _drop_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.is_leaf:  # a twin's of a scripted layer are none
            parameter.requires_grad_(False)


@dataclass
class _Surgery:
    """What happens to one owner: its fused blocks, the layers that they take over, and its new class or graph."""

    path: str
    fusions: list[Fusion] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)
    graph: fx.Graph | None = None
    cls: type[nn.Module] | None = None

    def perform(self, model: nn.Module, *, kernels: bool) -> None:
        """Change the owner in a model; nothing in here is expected to fail."""
        owner = model.get_submodule(self.path)
        for fusion in self.fusions:
            _fuse(owner, fusion, kernels=kernels)
        if self.graph is not None:
            cast("fx.GraphModule", owner).graph = self.graph
        elif self.cls is not None:
            owner.__class__ = self.cls


def _fuse(owner: nn.Module, fusion: Fusion, *, kernels: bool) -> None:
    fused = FusedSqueezeExcite(
        cast("SqueezeExcite", owner.get_submodule(fusion.block)),
        convolution=cast("_ConvNd", copy.copy(owner.get_submodule(fusion.convolution))) if fusion.convolution else None,
        scaled=cast("_ConvNd", owner.get_submodule(fusion.scaled)) if fusion.scaled else None,
        activation=fusion.activation,
        makers=[owner.get_submodule(name) for name in fusion.makers],
        kernels=kernels,
    )
    owner.set_submodule(fusion.block, mark_block(fused))
    if fusion.convolution:
        layer = owner.get_submodule(fusion.convolution)
        become(layer, make_identity(layer))


def _follow(model: nn.Module, twin: Twin, call: Call) -> Course:
    """Follow a run of the network over fake tensors, or over zeros where its course depends on the data."""
    try:
        with set_training(twin.model, False), apart(twin.model), kept_random_state(), twin.mode:
            run = functools.partial(twin.model, *call.args, **call.kwargs)
            course = follow_norms(twin.model, run)
            if (tap := getattr(twin.model, _TAP, None)) is not None:
                with contextlib.suppress(Exception):  # a tap that does not run is nobody's
                    course = course.agree(follow_norms(twin.model, functools.partial(tap, *call.args, **call.kwargs)))
            return confirm_folds(twin.model, run, course)
    except DATA_DEPENDENT:
        copied, given = copy_model(model).eval().requires_grad_(False), make_zeros(call, model)
        with apart(copied), kept_random_state():
            return follow_norms(copied, functools.partial(copied, *given.args, **given.kwargs), has_steps=False)


def _differs(twin: Twin, entry: Entry, call: Call, trace: Trace) -> bool:
    """Tell whether the code that would be written without any fusion does less than the owner's, or something else."""
    owner = twin.model.get_submodule(entry.path)
    written = write_method(owner, [trace])
    if has_method(type(owner), written):
        return False
    is_narrow = is_narrower(type(owner), written)
    return is_narrow or bool(find_difference(twin, entry, call, written, training=False))


def _list_below(prefix: str, paths: Iterable[str]) -> set[str]:
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


def _list_entries(model: nn.Module) -> Iterator[tuple[Entry, list[str], object]]:
    """List the methods that run blocks, with the blocks' names and a call: of a network, or of injected ones in it."""
    for path, module in model.named_modules():
        if (plan := find_plan(module)) is None:
            continue
        for entry, sites in plan.iterate_entries():
            full = ".".join(filter(None, (path, entry.path)))
            try:
                owner = model.get_submodule(full)
            except AttributeError:
                continue  # it was taken out after the injection
            names = [site.name for site in sites if type(getattr(owner, site.name, None)) is SqueezeExcite]
            if names:
                yield Entry(full, entry.method), names, plan.calls[entry.key]


def _list_reads_around(model: nn.Module, entry: Entry, list_reads: Callable[..., set[str]]) -> set[str]:
    """List what other methods of an owner, and of the modules around it, read."""
    parts = entry.path.split(".") if entry.path else []
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    reads = (list_reads(type(module), is_owner=module is around[-1]) for module in around)
    return set[str]().union(*reads)


def _prepare(twin: Twin, course: Course) -> list[_Surgery]:
    """Do all that can fail: edit the graphs and write the code. Owners that cannot be followed are left as they are."""
    surgeries: dict[str, _Surgery] = {}
    list_reads = functools.cache(list_reads_elsewhere)  # for this time: classes are not to be kept
    for entry, names, values in _list_entries(twin.model):
        prefix = f"{entry.path}." if entry.path else ""
        owner = twin.model.get_submodule(entry.path)
        bare = _list_below(prefix, (fold.norm for fold in course.folds if fold.is_bare))
        single = _list_below(prefix, (path for path, num in course.num_uses.items() if num == 1))
        read = _list_reads_around(twin.model, entry, list_reads)
        free = {path for path in single if path.partition(".")[0] not in read}
        call = decode_call(values, twin)
        try:
            trace = trace_entry(twin, entry, call, training=False)
            is_graph = isinstance(owner, fx.GraphModule)
            if trace.doubt or (not is_graph and _differs(twin, entry, call, trace)):
                continue
            fusions = fuse_blocks(
                owner, trace.graph, names, bare=bare, free=free, keeping=_list_below(prefix, course.keeping)
            )
            method = None if is_graph else write_method(owner, [trace])
        except TraceError:
            continue
        surgery = surgeries.setdefault(entry.path, _Surgery(entry.path))
        surgery.fusions += fusions
        if method is None:
            surgery.graph = forget_values(trace.graph)
        else:
            surgery.methods[entry.method] = method
    for surgery in surgeries.values():
        if surgery.methods:
            base = type(twin.model.get_submodule(surgery.path))
            notes = [str(fusion) for fusion in surgery.fusions]
            surgery.cls = derive_class(base, notes, surgery.methods, prefix="Fast", purpose="for evaluation")
    return list(surgeries.values())
