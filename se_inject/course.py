"""Courses: what a run of a network shows of its convolutions and batch norms.

Takes a network in eval mode, over real or fake tensors, and a run of it; gives the `Course`, with the batch norms that
can be folded. How the code is written does not matter. Another course of the same network is not seen; where a batch
norm did not run there is one, and the convolutions that it may follow are left alone. Leaves the network as it was.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from se_inject.account import describe_value
from se_inject.faithful import list_held, list_inside
from se_inject.folding import Fold, find_extras, is_hooked, lacks_bias, make_bias
from se_inject.functions import CONVOLUTIONS
from se_inject.interception import intercepted

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_QUESTIONS = frozenset({
    "__get__", "__len__", "dim", "dtype", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "is_signed", "ndimension", "nelement", "numel", "size", "storage_offset",
    "stride", "type",
})  # fmt: skip
"""Functions that tell of a tensor what its numbers do not matter for."""


@dataclass(frozen=True)
class Course:
    """What a run showed.

    Attributes:
        folds: The batch norms that can go into a convolution.
        num_uses: How often the tensors of each convolution and each batch norm were used, by itself or by others.
        keeping: The modules that hold tensors in their attributes, such as a map that somebody looks at afterwards.
        steps: What ran, one after the other, and the shapes that it gave.
    """

    folds: tuple[Fold, ...]
    num_uses: Counter[str]
    keeping: frozenset[str]
    steps: tuple[Step, ...]

    def agree(self, other: Course) -> Course:
        """Keep the folds that another run of the same network shows too, or says nothing of."""
        uses = other.num_uses
        kept = (f for f in self.folds if f in other.folds or not (uses[f.convolution] or uses[f.norm]))
        return replace(self, folds=tuple(kept), keeping=self.keeping | other.keeping)


def follow_norms(model: nn.Module, run: Callable[[], object], *, has_steps: bool = True) -> Course:
    """Find the batch norms that can go into the convolution before them.

    Args:
        model: A network in eval mode, over real or fake tensors.
        run: Runs it once, and returns its outputs.
        has_steps: Whether the steps are noted, for which all maps of the run are kept.
    """
    with given_biases(model):
        watch = Watch(model, has_steps=has_steps)
        with torch.no_grad(), watch.noted_calls(), watch:
            outputs = run()
    held = {path: list_held(module) for path, module in model.named_modules()}
    given = [*(leaves := tree_leaves(outputs)), *list_inside(leaves)]
    for x in (*given, *itertools.chain.from_iterable(held.values())):
        watch.note_reader(x, None)
    watch.note_use(given)
    folds = []
    rivalled = _find_rivalled(model, watch.num_uses)
    for path, readers in watch.readers.items():
        [norm] = readers if len(readers) == 1 else [None]
        is_only = norm is not None and watch.num_uses[path] == watch.num_uses[norm] == 1
        if norm is not None and is_only and path not in rivalled and _can_fold(model, path, norm):
            folds.append(Fold(path, norm, not find_extras(model.get_submodule(norm))))
    keeping = frozenset(path for path, tensors in held.items() if tensors)
    watch.note_step("", None, leaves, None)
    return Course(tuple(folds), watch.num_uses, keeping, tuple(watch.steps))


def _find_rivalled(model: nn.Module, num_uses: Counter[str]) -> set[str]:
    """Find the convolutions that another course may hand to a batch norm that did not run, as one norm a domain has it.

    They are those of as many channels in the innermost module around the norm that has any: its own, or else all in it.
    """
    channels = {path: module.out_channels for path, module in model.named_modules() if isinstance(module, _ConvNd)}
    found: set[str] = set()
    for path, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or num_uses[path] or not norm.state_dict():  # unseen without tensors
            continue
        around, near = path, set[str]()
        while around and not near:
            around = around.rpartition(".")[0]
            near = {other for other in channels if other.startswith(f"{around}." if around else "")}
        near = {other for other in near if channels[other] == norm.num_features}
        found |= {other for other in near if other.rpartition(".")[0] == around} or near
    return found


@contextmanager
def given_biases(model: nn.Module) -> Iterator[None]:
    """Give each convolution a bias of zeros for as long as the context lasts, to see whether the code has it added."""
    bare = [module for module in model.modules() if isinstance(module, _ConvNd) and lacks_bias(module)]
    try:
        for convolution in bare:
            convolution.bias = make_bias(convolution)
        yield
    finally:
        for convolution in bare:
            convolution.bias = None


def _can_fold(model: nn.Module, path: str, norm_path: str) -> bool:
    convolution, norm = model.get_submodule(path), model.get_submodule(norm_path)
    is_known = type(norm) in _PLAIN_NORMS or find_extras(norm) is not None
    return bool(path and norm_path) and is_known and not is_hooked(convolution) and not is_hooked(norm)


@dataclass(frozen=True)
class Step:
    """A function that ran, the shapes of what it gave, what it was handed, and whose it was if it was a batch norm's.

    A tensor is told by the step that it comes from, as if no batch norm had been in between; a plain value by itself.
    """

    name: str
    shapes: tuple[torch.Size, ...]
    arguments: tuple[object, ...]
    norm: str | None


@dataclass
class _Made:
    """What a convolution made; held so that no other tensor takes its identity."""

    tensor: Tensor
    path: str


class Watch(TorchFunctionMode):
    """Follows what convolutions make to whatever reads it: the path of a batch norm, or None for anything else."""

    def __init__(self, model: nn.Module, *, has_steps: bool = True) -> None:
        super().__init__()
        self._has_steps = has_steps
        self._num_steps = 0  # without those of batch norms
        self._sources: dict[int, object] = {id(x): id(x) for x in (*model.parameters(), *model.buffers())}
        self._seen: list[object] = []  # kept, so that no other tensor gets the id of one
        self.readers: dict[str, set[str | None]] = {}
        self.num_uses: Counter[str] = Counter()
        self.steps: list[Step] = []
        self._made: dict[int, _Made] = {}
        self._weights: dict[int, tuple[str, _ConvNd]] = {}
        self._means: dict[int, tuple[str, _BatchNorm]] = {}
        self._owners: dict[int, set[str]] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        for path, module in model.named_modules():
            is_odd = isinstance(module, _ConvTransposeNd) and module.groups > 1  # torch's fusion cannot
            if isinstance(module, _ConvNd) and module._parameters.get("weight") is not None and not is_odd:
                self._weights[id(module.weight)] = path, module
            elif isinstance(module, _BatchNorm) and module._buffers.get("running_mean") is not None:
                self._means[id(module.running_mean)] = path, module
            if isinstance(module, (_ConvNd, _BatchNorm)):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    self._owners.setdefault(id(tensor), set()).add(path)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if result is not None and not any(isinstance(x, Tensor) for x in tree_leaves(result)):
            if name not in _QUESTIONS:
                for x in leaves:
                    self.note_reader(x, None)
            self._note_question(leaves)
            return result
        norm = self._find_norm(args, kwargs) if name == "batch_norm" else None
        if name != "_assert":  # as a norm checks its input
            self.note_step(name, result, tree_leaves((args, kwargs)), norm)
        for i, x in enumerate(leaves):
            self.note_reader(x, norm if i == 0 else None)
        if norm is not None:
            self.num_uses[norm] += 1
        elif name in CONVOLUTIONS and isinstance(result, Tensor):
            self._note_convolution(result, leaves)
        else:
            self.note_use(leaves)
        return result

    def note_step(self, name: str, result: object, arguments: Sequence[object], norm: str | None) -> None:
        """Note what ran, with what it was handed and gave."""
        if not self._has_steps:
            return
        described = [self._describe(x) for x in arguments]
        if name in CONVOLUTIONS:
            described[2:3] = [None]  # the bias, which may have been given to it anew
        given = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.steps.append(Step(name, tuple(x.shape for x in given), tuple(described), norm))
        for i, x in enumerate(given):
            self._sources[id(x)] = (self._num_steps, i) if norm is None else described[0]
        self._seen += given
        self._num_steps += norm is None

    def _describe(self, x: object) -> object:
        return self._sources.get(id(x), "tensor") if isinstance(x, Tensor) else describe_value(x)

    @contextmanager
    def noted_calls(self) -> Iterator[None]:
        """Note what hooks are shown, and what scripted modules read, whose functions are not seen."""

        def call(original: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            result = original(module, *args, **kwargs)
            if is_hooked(module) or isinstance(module, torch.jit.ScriptModule):
                for x in tree_leaves((args, kwargs, result)):
                    self.note_reader(x, None)
            return result

        with intercepted("__call__", call):
            yield

    def note_use(self, leaves: Iterable[object]) -> None:
        """Note that something else than a layer itself uses the layer's tensors, which then have to stay."""
        self.num_uses.update({path for x in leaves for path in self._owners.get(id(x), ())})

    def _note_question(self, leaves: Iterable[Tensor]) -> None:
        """Note that something else than the layer itself asks for a shape or a type: `x.to(self.bn.weight.dtype)`."""
        if any(id(x) in self._owners for x in leaves):
            asking = self._find_running()
            self.note_use(x for x in leaves if asking not in self._owners.get(id(x), ()))

    def _find_running(self) -> str | None:
        """Find the module whose own code is running."""
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
            frame = frame.f_back
        return None if frame is None else self._paths.get(id(frame.f_locals["self"]))

    def note_reader(self, x: object, norm: str | None) -> None:
        """Note that something reads a tensor: a batch norm, or anything else."""
        made = self._made.get(id(x))
        if made is not None:
            self.readers[made.path].add(norm)

    def _find_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Find the layer whose batch norm this is: by its own code, its statistics, weight, bias and epsilon."""
        given = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
        path, norm = self._means.get(id(given.get("running_mean")), ("", None))
        if norm is None or given.get("training") or self._find_running() != path:
            return None
        own = (norm.running_var, norm.weight, norm.bias)
        is_own = all(given.get(name) is x for name, x in zip(("running_var", "weight", "bias"), own, strict=True))
        return path if is_own and given.get("eps", 1e-5) == norm.eps else None

    def _note_convolution(self, result: Tensor, leaves: Sequence[Tensor]) -> None:
        """Note what a layer's convolution made, if it is of the layer's own weight and bias."""
        path, module = next((self._weights[id(x)] for x in leaves if id(x) in self._weights), ("", None))
        if module is None:
            return
        self.num_uses[path] += 1
        is_batch = result.ndim == module.weight.ndim  # a single image has its channels elsewhere
        if is_batch and [id(x) for x in leaves[1:]] == [id(x) for x in (module.weight, module.bias) if x is not None]:
            self.readers.setdefault(path, set())
            self._made[id(result)] = _Made(result, path)
