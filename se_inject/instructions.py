"""Instructions: what a method does that a graph of it cannot hold, read from its bytecode.

Takes a class and its method, gives the reason where the code asks or does such a thing. Runs nothing.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from se_inject.calls import METHODS

_LISTINGS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})


def find_mode_read(owner: nn.Module, method: Callable[..., Any]) -> str:
    """Find code that asks for a mode in a way that a proxy cannot answer: `is True`, or a child's flag."""
    asks = any(map(_asks_oddly, _walk_functions(type(owner), method)))
    return "its code asks for a mode other than by a plain `self.training`" if asks else ""


def asks_identity(owner: nn.Module, method: Callable[..., Any]) -> bool:
    """Tell whether code asks whether something is None, or another object, which a proxy is not."""
    return _executes(owner, method, lambda name: name == "IS_OP" or "NONE" in name)


def asks_identity_of_local(owner: nn.Module, method: Callable[..., Any]) -> bool:
    """Tell whether code asks so of a variable, such as an argument; not of an attribute."""
    return any(map(_asks_local, _walk_functions(type(owner), method)))


def find_class_read(owner: nn.Module, method: Callable[..., Any]) -> str:
    """Find code that asks for the very class of an object with `type`, which a proxy does not tell."""
    asks = any(map(_asks_class, _walk_functions(type(owner), method)))
    return "its code asks for the class of an object with type()" if asks else ""


def find_global_write(owner: nn.Module, method: Callable[..., Any]) -> str:
    """Find code that sets a variable of its file, a counter, say; a graph holds no such thing."""
    is_set = _executes(owner, method, lambda name: name in ("STORE_GLOBAL", "DELETE_GLOBAL"))
    return "its code sets a variable of its file" if is_set else ""


def find_handler(owner: nn.Module, method: Callable[..., Any]) -> str:
    """Find code that catches errors: over fake tensors, and for other images, others are raised."""
    return "its code catches errors" if _executes(owner, method, lambda name: name == "CHECK_EXC_MATCH") else ""


def lists_children(kind: type[nn.Module], name: str) -> bool:
    """Tell whether a method of a class goes through the children, whatever they are, and would run one more."""
    if issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    functions = _walk_functions(kind, getattr(kind, name))
    own = (function for function in functions if getattr(kind, function.__name__, None) is function)
    return any(_LISTINGS.intersection(_list_own_reads(function)) for function in own)


def list_reads_elsewhere(kind: type[nn.Module], *, is_owner: bool) -> set[str]:
    """List what a module's methods for its users, beside those that a network runs, read of modules: to run them, say.

    Args:
        kind: The module's class.
        is_owner: Whether its own attributes count, or those of others alone.
    """
    reads: set[str] = set()
    for name in dir(kind):
        method = inspect.getattr_static(kind, name, None)
        is_hidden = name.startswith("_") or name in METHODS or hasattr(nn.Module, name)
        if is_hidden or not isinstance(method, FunctionType) or len(inspect.signature(method).parameters) < 2:
            continue  # what takes no input sets weights up
        for function in _walk_functions(kind, method):
            if function.__name__ not in METHODS:
                found = _list_reads(function)
                reads.update(read for read, is_own in found if is_owner or not is_own)
    return reads


def _list_reads(function: FunctionType) -> Iterator[tuple[str, bool]]:
    """List the attributes that code reads, without those that are asked for their channels, and whether of `self`."""
    for code in _walk_code(function.__code__):
        instructions = _list_instructions(code)
        for i, instruction in enumerate(instructions):
            is_read = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
            is_asked = i + 1 < len(instructions) and instructions[i + 1].argval in nn.Conv2d.__constants__
            if is_read and not is_asked:
                yield str(instruction.argval), i > 0 and _reads_first(function, instructions[i - 1])


def _walk_functions(kind: type, method: Callable[..., Any]) -> Iterator[FunctionType]:
    """Go through a method's function and those that it names, of its class and its file, without torch's."""
    seen: set[FunctionType] = set()
    waiting = [inspect.unwrap(getattr(method, "__func__", method))]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        if str(function.__module__).partition(".")[0] == "torch":
            continue
        seen.add(function)
        yield function
        for name in function.__code__.co_names:
            found = inspect.getattr_static(kind, name, None)
            found = function.__globals__.get(name) if found is None else found
            waiting.append(inspect.unwrap(found) if isinstance(found, FunctionType) else found)


def _executes(owner: nn.Module, method: Callable[..., Any], matches: Callable[[str], bool]) -> bool:
    functions = _walk_functions(type(owner), method)
    return any(matches(i.opname) for function in functions for i in _list_instructions(function.__code__))


@functools.lru_cache
def _list_instructions(code: CodeType) -> list[dis.Instruction]:
    """List the instructions of code, which many modules share."""
    return list(dis.get_instructions(code))


def _asks_oddly(function: FunctionType) -> bool:
    instructions = _list_instructions(function.__code__)
    for i, instruction in enumerate(instructions):
        if instruction.argval == "training" and instruction.opname.startswith("LOAD_ATTR"):
            compared = any(later.opname in ("IS_OP", "COMPARE_OP") for later in instructions[i + 1 : i + 3])
            if not _reads_first(function, instructions[i - 1]) or compared:
                return True
    return False


def _asks_local(function: FunctionType) -> bool:
    instructions = _list_instructions(function.__code__)
    for i, instruction in enumerate(instructions):
        later = [each for each in instructions[i + 1 : i + 3] if each.opname != "LOAD_CONST"]
        is_asked = bool(later) and (later[0].opname == "IS_OP" or "NONE" in later[0].opname)
        if is_asked and instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            return True
    return False


def _asks_class(function: FunctionType) -> bool:
    if "type" in function.__globals__:
        return False
    for code in _walk_code(function.__code__):
        instructions = _list_instructions(code)
        for i, instruction in enumerate(instructions):
            if instruction.argval == "type" and instruction.opname == "LOAD_GLOBAL":
                is_told = any("FORMAT" in later.opname for later in instructions[i + 1 : i + 6])  # in a message
                if not is_told and instructions[i + 1].argval != "self":
                    return True
    return False


def _walk_code(code: CodeType) -> Iterator[CodeType]:
    """Go through a function's code and that of the functions, lambdas and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _walk_code(constant)


def _list_own_reads(function: FunctionType) -> Iterator[str]:
    """List what a method reads of its first argument, as `children` in `self.children()`."""
    for before, instruction in itertools.pairwise(_list_instructions(function.__code__)):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and _reads_first(function, before):
            yield str(instruction.argval)


def _reads_first(function: FunctionType, instruction: dis.Instruction) -> bool:
    """Tell whether an instruction loads the first argument, alone or after another variable."""
    name = instruction.argval
    asked = name if isinstance(name, str) else name[-1] if isinstance(name, tuple) and name else ""
    return (asked,) == function.__code__.co_varnames[:1]
