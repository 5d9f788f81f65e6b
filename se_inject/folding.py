"""Folding: put batch norms into the convolutions before them, which is exact in eval mode.

`follow_norms` runs a twin once and follows what each convolution makes; `fold_norms` changes a model. A fold is found
where that run shows it: the convolution runs once, and one batch norm alone reads what it makes. How the code is
written does not matter. Another course of the same network is not seen; where a batch norm did not run there is one,
and the convolutions that it may follow are left alone.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from se_inject.faithful import list_held
from se_inject.functions import CONVOLUTIONS
from se_inject.tracing import replaced

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Fold:
    """A convolution and the batch norm that can go into it, by their paths.

    Attributes:
        is_bare: Whether the norm does nothing beside, such as an activation.
    """

    convolution: str
    norm: str
    is_bare: bool


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
    steps: tuple[_Step, ...]

    def agree(self, other: Course) -> Course:
        """Keep the folds that another run of the same network shows too, or says nothing of."""
        uses = other.num_uses
        kept = (f for f in self.folds if f in other.folds or not (uses[f.convolution] or uses[f.norm]))
        return replace(self, folds=tuple(kept), keeping=self.keeping | other.keeping)

    def list_without(self, folds: Collection[Fold]) -> list[_Step]:
        """List what would run if some batch norms were folded."""
        norms = {fold.norm for fold in folds}
        return [step for step in self.steps if step.norm not in norms]


def follow_norms(model: nn.Module, run: Callable[[], object]) -> Course:
    """Find the batch norms that can go into the convolution before them.

    Args:
        model: A network in eval mode, over real or fake tensors.
        run: Runs it once, and returns its outputs.
    """
    with _given_biases(model):
        watch = _Watch(model)
        with torch.no_grad(), watch.noted_calls(), watch:
            outputs = run()
    held = {path: list_held(module) for path, module in model.named_modules()}
    for x in (*tree_leaves(outputs), *itertools.chain.from_iterable(held.values())):
        watch.note_reader(x, None)
    watch.note_use(tree_leaves(outputs))
    folds = []
    rivalled = _find_rivalled(model, watch.num_uses)
    for path, readers in watch.readers.items():
        [norm] = readers if len(readers) == 1 else [None]
        is_only = norm is not None and watch.num_uses[path] == watch.num_uses[norm] == 1
        if norm is not None and is_only and path not in rivalled and _can_fold(model, path, norm):
            folds.append(Fold(path, norm, not _find_extras(model.get_submodule(norm))))
    keeping = frozenset(path for path, tensors in held.items() if tensors)
    return Course(tuple(folds), watch.num_uses, keeping, (*watch.steps, _Step("", _get_shapes(outputs))))


def confirm_folds(model: nn.Module, run: Callable[[], object], course: Course) -> Course:
    """Drop the folds after which the network would take another course, as code does that asks a layer for its class.

    Args:
        model: The network that was followed.
        run: Runs it once more, as it was run then.
        course: What was seen.
    """

    def confirm(folds: Sequence[Fold]) -> Sequence[Fold]:
        with _left_out(model, folds):
            try:
                steps = list(follow_norms(model, run).steps)
            except Exception:  # noqa: BLE001  whatever code makes of a layer that is another one
                steps = []
        if steps == course.list_without(folds):
            return folds
        half = len(folds) // 2
        return [*confirm(folds[:half]), *confirm(folds[half:])] if half else ()

    return replace(course, folds=tuple(confirm(course.folds))) if course.folds else course


@contextmanager
def _left_out(model: nn.Module, folds: Iterable[Fold]) -> Iterator[None]:
    """Let batch norms do no more than what they do beside, for as long as the context lasts."""
    norms = [model.get_submodule(fold.norm) for fold in folds]
    originals = [(norm, type(norm), dict(vars(norm))) for norm in norms]
    try:
        for norm in norms:
            become(norm, _make_rest(norm))
        yield
    finally:
        for norm, kind, attributes in originals:
            _set(norm, kind, attributes)


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
def _given_biases(model: nn.Module) -> Iterator[None]:
    """Give each convolution a bias of zeros for as long as the context lasts, to see whether the code has it added."""
    bare = [module for module in model.modules() if isinstance(module, _ConvNd) and _lacks_bias(module)]
    try:
        for convolution in bare:
            convolution.bias = _make_bias(convolution)
        yield
    finally:
        for convolution in bare:
            convolution.bias = None


def add_biases(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Give the convolutions of folds a bias of zeros where they have none, which code that is written then hands on."""
    for fold in folds:
        convolution = cast("_ConvNd", model.get_submodule(fold.convolution))
        if _lacks_bias(convolution):
            convolution.bias = _make_bias(convolution)


def _lacks_bias(convolution: _ConvNd) -> bool:
    parameters = convolution._parameters
    return parameters.get("weight") is not None and "bias" in parameters and parameters["bias"] is None


def _make_bias(convolution: _ConvNd) -> nn.Parameter:
    weight = convolution.weight
    return nn.Parameter(weight.detach().new_zeros(convolution.out_channels), requires_grad=weight.requires_grad)


def fold_norms(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Fold batch norms into their convolutions, in place; what a norm did beside (an activation) stays in its place."""
    for fold in folds:
        convolution = cast("_ConvNd", model.get_submodule(fold.convolution))
        norm = cast("_BatchNorm", model.get_submodule(fold.norm))
        kind, needs_grad = convolution.weight.dtype, convolution.weight.requires_grad
        tensors = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var)
        weight, bias, mean, variance, scale, shift = (
            None if x is None else x.detach().double() for x in (*tensors, norm.weight, norm.bias)
        )
        assert weight is not None
        assert mean is not None
        assert variance is not None
        is_transposed = isinstance(convolution, _ConvTransposeNd)
        found = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift, transpose=is_transposed)
        convolution.weight, convolution.bias = (nn.Parameter(x.to(kind), needs_grad) for x in found)
        become(norm, _make_rest(norm))


def is_hooked(module: nn.Module) -> bool:
    """Tell whether somebody looks at what a module is handed or gives, by a hook or by a forward of the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001  there is no public way
    return bool(hooks) or "forward" in vars(module)


def _can_fold(model: nn.Module, path: str, norm_path: str) -> bool:
    convolution, norm = model.get_submodule(path), model.get_submodule(norm_path)
    is_known = type(norm) in _PLAIN_NORMS or _find_extras(norm) is not None
    return bool(path and norm_path) and is_known and not is_hooked(convolution) and not is_hooked(norm)


def _find_extras(norm: nn.Module) -> Sequence[nn.Module] | None:
    """Return what timm's norm with an activation does after the norm, or None for a norm that is not known."""
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    is_timms = type(norm).__module__ == "timm.layers.norm_act" and type(norm).__name__.startswith("BatchNormAct")
    if not is_timms or not isinstance(drop, nn.Module) or not isinstance(act, nn.Module):
        return None
    return [layer for layer in (drop, act) if not isinstance(layer, nn.Identity)]


def _make_rest(norm: nn.Module) -> nn.Module:
    extras = _find_extras(norm) or ()
    if len(extras) == 1:
        return extras[0]
    return nn.Sequential(*extras).train(norm.training) if extras else make_identity(norm)


def become(module: nn.Module, other: nn.Module) -> None:
    """Make a module what another one is, wherever it is held: by several names, and in plain lists."""
    _set(module, type(other), dict(vars(other)))


def _set(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)


def make_identity(layer: nn.Module) -> nn.Identity:
    """Make what stands for a convolution or a norm that others run now; its channels, stride and so on can be read."""
    identity = nn.Identity().train(layer.training)
    constants = cast("list[str]", layer.__constants__)
    vars(identity).update((key, value) for key, value in vars(layer).items() if key in constants)
    return identity


@dataclass(frozen=True)
class _Step:
    """A function that ran, the shapes of what it gave, and whose it was if it was that of a batch norm."""

    name: str
    shapes: tuple[torch.Size, ...]
    norm: str | None = None


@dataclass
class _Made:
    """What a convolution made; held so that no other tensor takes its identity."""

    tensor: Tensor
    path: str


class _Watch(TorchFunctionMode):
    """Follows what convolutions make to whatever reads it: the path of a batch norm, or None for anything else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.readers: dict[str, set[str | None]] = {}
        self.num_uses: Counter[str] = Counter()
        self.steps: list[_Step] = []
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
            self._note_question(leaves)
            return result
        norm = self._find_norm(args, kwargs) if name == "batch_norm" else None
        if name != "_assert":  # as a norm checks its input
            self.steps.append(_Step(name, _get_shapes(result), norm))
        for i, x in enumerate(leaves):
            self.note_reader(x, norm if i == 0 else None)
        if norm is not None:
            self.num_uses[norm] += 1
        elif name in CONVOLUTIONS and isinstance(result, Tensor):
            self._note_convolution(result, leaves)
        else:
            self.note_use(leaves)
        return result

    @contextmanager
    def noted_calls(self) -> Iterator[None]:
        """Note what hooks are shown, and what scripted modules read, whose functions are not seen."""
        original = nn.Module.__call__

        def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            result = original(module, *args, **kwargs)
            if is_hooked(module) or isinstance(module, torch.jit.ScriptModule):
                for x in tree_leaves((args, kwargs, result)):
                    self.note_reader(x, None)
            return result

        with replaced(nn.Module, "__call__", call):
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


def _get_shapes(result: object) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in tree_leaves(result) if isinstance(x, Tensor))
