"""Caches: what a network's code keeps outside of the network, put back after a run over fake tensors.

A twin has attributes of its own, but class attributes, the globals of its files and the caches of functools are the
model's too, and a fake tensor that stays in one of them breaks the model. Takes a network, gives a context. Compares by
identity alone, and runs no code of what it finds; where nothing of a twin was left, nothing is put back.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from se_inject.errors import TraceError
from se_inject.readings import Number

_DEPTH = 5
"""Steps from a class: to a method, to what its code names, as another function or a store, to attributes, to a dict."""
_FOREIGN = (sys.stdlib_module_names - {"__main__"}) | {"torch", "numpy", "se_inject"}
"""Packages that keep nothing of a network's, and much of their own."""
_GENERATED = "se_inject.generated."
_CACHE: Any = type(functools.cache(len))
_MAPPINGS: tuple[Any, ...] = (OrderedDict, dict, WeakKeyDictionary, WeakValueDictionary)
_COLLECTIONS: tuple[Any, ...] = (list, deque, set, WeakSet)
_PLACES = frozenset([*_MAPPINGS, *_COLLECTIONS, CellType, type])
_FUNCTIONS: tuple[Any, ...] = (FunctionType, _CACHE, staticmethod, classmethod, property)
_BASES: tuple[Any, ...] = (*_MAPPINGS, *_COLLECTIONS, CellType, type, tuple, *_FUNCTIONS)


@dataclass(frozen=True)
class _Place:
    """Something in which code can keep what it computes.

    Attributes:
        holder: A class, a container, or a variable of a closure.
        base: The type whose methods read and write it, for those of a subclass may do anything.
        was: What was in it: a dict, or a list.
    """

    holder: Any
    base: Any
    was: Any


@contextmanager
def kept_caches(model: nn.Module, *, refuse_traced: bool = False) -> Iterator[None]:
    """Put back the class attributes of a network's classes and the globals of their files, and what their code names.

    Caches of functools that were added to are emptied, which loses nothing but time. Modules that were imported stay.
    Out of reach are slots, and files of other packages than those of the classes.

    Args:
        model: The network that runs, or a twin of it; its own attributes are not looked at.
        refuse_traced: Raise if a proxy was put there, or a tensor that was made while tracing: a graph does no such
            thing.

    Raises:
        TraceError: One was.
    """
    places, caches = _find_places(model)
    try:
        yield
        if refuse_traced and any(_holds_new(place, _is_traced) for place in places):
            raise TraceError("its code keeps what it computes in a class attribute or a global")
    finally:
        # Else other threads may have changed it. Where something is left, what was kept along with it must go too.
        if any(_holds_new(place, _is_left) for place in places):
            for place in places:
                with suppress(Exception):  # keys, say, that cannot be compared
                    _put_back(place)
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _find_places(model: nn.Module) -> tuple[list[_Place], list[tuple[Any, int]]]:
    """Find the places, and the caches of functools with the misses that they had."""
    kinds = {id(base): base for module in model.modules() for base in type(module).__mro__}
    level: list[Any] = [kind for kind in kinds.values() if _get_package(kind) not in _FOREIGN]
    packages = {_get_package(kind) for kind in level}
    seen = {id(sys.modules), *map(id, level)}
    bases: dict[int, Any] = {}  # by the types' ids, for a metaclass may define a hash
    places: list[_Place] = []
    caches: list[tuple[Any, int]] = []
    files: dict[int, dict[str, Any]] = {}
    for depth in range(_DEPTH + 1):
        fresh: dict[int, Any] = {}
        for value in level:
            kind = type(value)
            base = bases[id(kind)] if id(kind) in bases else bases.setdefault(id(kind), _find_base(kind))
            if base is None or (base is type and _get_package(value) not in packages):
                continue
            with suppress(Exception):  # another thread writes on it, say
                if base in _PLACES:
                    places.append(_Place(value, base, _read(value, base)))
                inside = _list_values(places[-1].was) if base in _PLACES else _look_inside(value, base, packages)
                if base is _CACHE:
                    caches.append((value, value.cache_info().misses))
                if base is FunctionType and _is_near(value.__globals__, packages):
                    files[id(value.__globals__)] = value.__globals__
                if depth < _DEPTH:
                    fresh |= {id(x): x for x in inside}
        level = [fresh[key] for key in fresh.keys() - seen]
        seen |= fresh.keys()
    return [*places, *(_Place(file, dict, dict.copy(file)) for file in files.values())], caches


def _get_package(kind: Any) -> str:
    """Return the package that a class is of."""
    return _find_package(str(kind.__module__))


def _find_package(file: str) -> str:
    """Return the outermost package of a file; code that was generated from the network's own is one by itself."""
    return _GENERATED if file.startswith(_GENERATED) else file.partition(".")[0]


def _find_base(kind: type) -> Any:
    """Find how values of a type are looked into; None for what keeps nothing of a network's."""
    line = set(map(id, kind.__mro__))  # issubclass asks the metaclass, and that of weak containers keeps what is asked
    if not line.isdisjoint(map(id, (nn.Module, Tensor, ModuleType))):
        return None
    base = next((base for base in _BASES if id(base) in line), None)
    is_store = base is None and (kind is SimpleNamespace or _get_package(kind) not in _FOREIGN)
    return object if is_store else base


def _read(holder: Any, base: Any) -> Any:
    """Copy what is in a place."""
    if base is dict:
        return dict.copy(holder)
    if base is type:
        return type.__getattribute__(holder, "__dict__").copy()
    if base is CellType:
        return [holder.cell_contents]
    return dict(base.items(holder)) if base in _MAPPINGS else list(base.__iter__(holder))


def _get_attributes(value: object) -> dict[str, Any]:
    """Return the attributes of an object without running its code; none where it has slots alone."""
    try:
        attributes: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes


def _look_inside(value: Any, base: Any, packages: Set[str]) -> Iterable[Any]:
    """List what may be a place, or hold one, in something that is none itself."""
    if base is tuple:
        return tuple.__iter__(value)
    if base is property:
        return (value.fget,)
    if base in (staticmethod, classmethod):
        return (value.__func__,)
    if base is _CACHE:
        return (value.__wrapped__,)
    if base is object:
        return (_get_attributes(value),)
    return _look_into_function(value, packages)


def _look_into_function(function: FunctionType, packages: Set[str]) -> Iterator[Any]:
    """List what a function keeps, and what its code names, in its file or in a module."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from function.__closure__ or ()
    yield function.__dict__
    if not _is_near(function.__globals__, packages):
        return
    names = set(_list_names(function.__code__))
    named = [function.__globals__[name] for name in names & function.__globals__.keys()]
    yield from named
    for module in (x for x in named if issubclass(type(x), ModuleType)):
        attributes = object.__getattribute__(module, "__dict__")
        if _is_near(attributes, packages):
            yield from (attributes[name] for name in names & attributes.keys())


def _list_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_names(constant)


def _is_near(file: Mapping[str, Any], packages: Set[str]) -> bool:
    return _find_package(str(file.get("__name__"))) in packages


def _list_values(content: Any) -> Collection[Any]:
    return content.values() if isinstance(content, dict) else content


def _holds_same(now: Any, was: Any) -> bool:
    if len(now) != len(was) or not all(map(operator.is_, now, was)):
        return False
    return not isinstance(was, dict) or all(map(operator.is_, now.values(), was.values()))


def _holds_new(place: _Place, matches: Callable[[type], bool]) -> bool:
    """Tell whether something of a kind was put in a place, within containers and plain objects too."""
    with suppress(Exception):  # another thread writes on it, say
        now = _read(place.holder, place.base)
        if not _holds_same(now, place.was):
            known = set(map(id, _list_values(place.was)))
            leaves = tree_leaves([x for x in _list_values(now) if id(x) not in known])
            stores = [_get_attributes(x) for x in leaves if _find_base(type(x)) is object]
            return any(matches(type(x)) for x in (*leaves, *tree_leaves(stores)))
    return False


def _is_traced(kind: type) -> bool:
    """Tell whether a value was made by the traced code itself: what its children make are fake tensors."""
    return issubclass(kind, (fx.Proxy, Number)) or (issubclass(kind, Tensor) and not issubclass(kind, FakeTensor))


def _is_left(kind: type) -> bool:
    """Tell whether a value is of use to a twin alone."""
    return issubclass(kind, (FakeTensor, fx.Proxy, Number, nn.Module))


def _put_back(place: _Place) -> None:
    holder, base, was = place.holder, place.base, place.was
    now = _read(holder, base)
    if _holds_same(now, was):
        return
    if base is CellType:
        holder.cell_contents = was[0]
    elif base in _COLLECTIONS:
        base.clear(holder)
        (base.extend if base in (list, deque) else base.update)(holder, was)
    else:
        write, drop = (type.__setattr__, type.__delattr__) if base is type else (base.__setitem__, base.__delitem__)
        for key, value in now.items():
            if key not in was and not _is_kept(key, value):
                drop(holder, key)
        for key, value in was.items():
            if now.get(key, now) is not value and not _is_kept(key, now.get(key)):
                write(holder, key, value)
        if base is OrderedDict:
            for key in was:
                OrderedDict.move_to_end(holder, key)


def _is_kept(key: Any, value: Any) -> bool:
    """Tell whether something stays as it is now: a module that was imported, or what is Python's own."""
    is_pythons = type(key) is str and key.startswith("__") and key.endswith("__")
    return is_pythons or issubclass(type(value), ModuleType)
