"""Accounts: what a method does, as the operators that it runs, the calls of its children and what it returns.

Takes a module of the fake twin, a method and a call, gives an account that can be compared with another method's. There
are no numbers in it: the tensors are fake. Leaves the module as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from se_inject.calls import Call
from se_inject.faithful import get_modes, kept_attributes, kept_random_state
from se_inject.interception import intercepted
from se_inject.twin import Twin, apart, get_device, set_training

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

Known = dict[object, tuple[list[Any], TreeSpec]]
"""What children gave, by what they were called with, so that none is run twice for arguments of a form."""


@dataclass(frozen=True)
class Step:
    """An operator that ran, or the call of a child.

    Attributes:
        name: Which one.
        form: The containers of its arguments.
        arguments: What is in these: tensors by the step that they come from, plain values as text.
        is_kept: Whether it does something beside its result, so that it counts even if nobody reads that.
    """

    name: str
    form: TreeSpec
    arguments: tuple[object, ...]
    is_kept: bool


@dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: which result of which step."""

    step: int
    index: int


def describe_value(value: object) -> str:
    """Describe a plain value; of any other object only its class is told."""
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def take_account(
    twin: Twin,
    owner: nn.Module,
    method: Callable[..., Any],
    call: Call,
    known: Known,
    *,
    training: bool,
    autocast: bool,
) -> list[Step] | None:
    """Run a method over fake tensors, and list all that counts; None if it raised.

    Args:
        twin: The fake twin.
        owner: The module of the twin whose method it is.
        method: The method, bound.
        call: What it is called with; it gets copies.
        known: What children gave so far; is filled.
        training: In train or in eval mode.
        autocast: Under autocast to bfloat16.
    """
    fresh: dict[int, Tensor] = {}

    def copy(x: object) -> object:  # the same tensor twice stays the same tensor twice
        return fresh.setdefault(id(x), x.clone()) if isinstance(x, Tensor) else x

    with twin.mode:
        args, kwargs = tree_map(copy, (call.args, call.kwargs))
    account = _Account(owner, list(fresh.values()), known)
    returned: list[object] = []
    try:
        with (
            set_training(owner, training),
            apart(owner),
            kept_random_state(),
            kept_attributes(owner),
            torch.no_grad(),
            torch.autocast(get_device(owner).type, torch.bfloat16, enabled=autocast),
            twin.mode,
            account.noted_calls(),
            account,
        ):
            returned.append(method(*args, **kwargs))
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        if not returned:
            return None
        returned.append("it changed an attribute")
    return account.finish((returned, args, kwargs))


class _Account(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Notes what runs in a method's own code.

    Args:
        owner: The module whose method it is.
        inputs: The tensors that the method is handed.
        known: What children gave so far.
    """

    def __init__(self, owner: nn.Module, inputs: list[Tensor], known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self._thread = threading.get_ident()
        self._steps: list[Step] = []
        self._is_inside = False
        self._names: dict[int, object] = {id(x): f"input {i}" for i, x in enumerate(inputs)}
        self._names |= {id(x): name for name, x in (*owner.named_parameters(), *owner.named_buffers())}
        self._seen: list[object] = []  # and kept, so that no other tensor gets the id of one

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_inside:
            return func(*args, **kwargs)
        is_kept = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags  # noqa: SLF001  torch
        form, arguments = self._encode((args, kwargs))
        result = func(*args, **kwargs)
        self._add(Step(str(func), form, arguments, is_kept), result)
        return result

    @contextmanager
    def noted_calls(self) -> Iterator[None]:
        """Let the call of a child be one step."""

        def call(original: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if self._is_inside or threading.get_ident() != self._thread:
                return original(module, *args, **kwargs)
            form, arguments = self._encode((args, kwargs))
            self._is_inside = True
            try:
                result = self._call(module, original, args, kwargs)
            finally:
                self._is_inside = False
            self._add(Step(f"call of {id(module)}", form, arguments, is_kept=True), result)
            return result

        with intercepted("__call__", call):
            yield

    def _call(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        key = id(module), module.training, *get_modes(), form, *map(_describe_tensor, leaves)
        if key in self._known:
            parts, given_form = self._known[key]
            return tree_unflatten([leaves[p] if isinstance(p, int) else p() for p in parts], given_form)
        result = original(module, *args, **kwargs)
        given, given_form = tree_flatten(result)
        after, after_form = tree_flatten((args, kwargs))
        is_changed = after_form != form or any(a is not b for a, b in zip(after, leaves, strict=True))
        if not is_changed and all(isinstance(x, (Tensor, *_PLAIN)) for x in (*leaves, *given)):
            places = {id(x): i for i, x in enumerate(leaves) if isinstance(x, Tensor)}
            self._known[key] = [places.get(id(x), _keep(x)) for x in given], given_form
        return result

    def _add(self, step: Step, result: object) -> None:
        for i, leaf in enumerate(tree_flatten(result)[0]):
            if isinstance(leaf, Tensor) and id(leaf) not in self._names:
                self._names[id(leaf)] = _Source(len(self._steps), i)
                self._seen.append(leaf)
        self._steps.append(step)

    def _encode(self, value: object) -> tuple[TreeSpec, tuple[object, ...]]:
        leaves, form = tree_flatten(value)
        return form, tuple(map(self._name, leaves))

    def _name(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return describe_value(value)
        if id(value) not in self._names:
            self._names[id(value)] = f"tensor {len(self._seen)}"
            self._seen.append(value)
        return self._names[id(value)]

    def finish(self, result: object) -> list[Step]:
        """List the steps that count, with what the method returns and has made of its arguments as the last one."""
        steps = [*self._steps, Step("return", *self._encode(result), is_kept=True)]
        used: set[int] = set()
        for i in reversed(range(len(steps))):
            if steps[i].is_kept or i in used:
                used |= {x.step for x in steps[i].arguments if isinstance(x, _Source)} | {i}
        places = {i: place for place, i in enumerate(sorted(used))}

        def place(x: object) -> object:
            return _Source(places[x.step], x.index) if isinstance(x, _Source) else x

        chosen = [steps[i] for i in places]
        return [Step(s.name, s.form, tuple(map(place, s.arguments)), s.is_kept) for s in chosen]


def _describe_tensor(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return describe_value(value)


def _keep(value: object) -> Callable[[], object]:
    """Keep what is needed to make another fake tensor like one, or a plain value."""
    if not isinstance(value, Tensor):
        return lambda: value
    shape, strides, dtype, device = value.shape, value.stride(), value.dtype, value.device
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device)
