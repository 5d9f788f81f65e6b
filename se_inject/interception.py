"""Methods of all modules that do something else for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_METHODS: dict[str, list[Callable[..., Any]]] = {}
"""By their names: the method of `nn.Module` itself, and what stands in for it, innermost last."""
_depth = 0


@contextmanager
def intercepting() -> Iterator[None]:
    """Keep what `intercepted` puts into `nn.Module` until the outermost of these contexts ends.

    To set a method of a class that has thousands of subclasses, as `nn.Module` has with timm, takes half a millisecond,
    and makes Python look up anew whatever it knew of them.
    """
    global _depth  # noqa: PLW0603  one for the process, as nn.Module is
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            for name, (original, *_) in _METHODS.items():
                setattr(nn.Module, name, original)
            _METHODS.clear()


@contextmanager
def intercepted(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a function be called for a method of all modules.

    Args:
        name: The method's.
        function: It is handed what the method was, the module, and the arguments.
    """
    with intercepting():
        if name not in _METHODS:
            _intercept(name)
        methods = _METHODS[name]
        methods.append(functools.partial(function, methods[-1]))
        try:
            yield
        finally:
            methods.pop()


def _intercept(name: str) -> None:
    original = vars(nn.Module)[name]
    methods = _METHODS[name] = [original]

    @functools.wraps(original)
    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return methods[-1](module, *args, **kwargs)

    setattr(nn.Module, name, call)
