"""Generated classes: subclasses of an owner's class whose methods run the blocks.

Takes a class and the source of its methods, gives a class. They live in modules of their own, so that inspect.getsource
and tracebacks show their code, and are pickled as their source.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import linecache
import sys
import threading
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from se_inject.codegen import Method, indent_method, write_class
from se_inject.errors import ModelError

_GENERATED = "se_inject.generated"

_classes: weakref.WeakValueDictionary[tuple[object, ...], type[nn.Module]] = weakref.WeakValueDictionary()
_LOCK = threading.RLock()


def get_base(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a generated class was derived from; any other class is returned as it is."""
    while "_se_inject_code" in vars(cls):
        cls = cls._se_inject_code[0]  # type: ignore[attr-defined]
    return cls


def derive_class(
    base: type[nn.Module], notes: Sequence[str], methods: Mapping[str, Method], *, prefix: str, purpose: str
) -> type[nn.Module]:
    """Derive a class that has the given methods.

    Args:
        base: The owner's class, which may be a generated one.
        notes: What the methods do, for the docstring.
        methods: The methods by name.
        prefix: What the class's name begins with: `SE` gives `SEBottleneck`.
        purpose: What the class is, for the docstring: "with squeeze-and-excitation".

    Raises:
        ModelError: No class can be derived from the base.
    """
    name = f"{prefix}{base.__name__}"
    docstring = f"{base.__name__} {purpose}: {'; '.join(notes)}."
    source = write_class(name, base.__name__, docstring.replace("\\", "/").replace('"', "'"), list(methods.values()))
    names = {name: value for method in methods.values() for name, value in method.names.items()}
    return _make_class(base, name, source, names)


def has_method(cls: type[nn.Module], method: Method) -> bool:
    """Tell whether a class is a generated one whose own method is this one, to the letter."""
    source, names = _get_own(cls)
    return indent_method(method) in source and all(names.get(key) is value for key, value in method.names.items())


def is_narrower(cls: type[nn.Module], method: Method) -> bool:
    """Tell whether a method refuses arguments that a class's own one takes."""
    source, _ = _get_own(cls)
    return any(line.strip() not in source for guard in method.guards for line in guard.splitlines())


def _get_own(cls: type[nn.Module]) -> tuple[str, Mapping[str, object]]:
    """Return a generated class's own source, and the objects behind its names; nothing for any other class."""
    _, _, source, names = vars(cls).get("_se_inject_code", (None, None, "", {}))
    return source, names


def _make_class(base: type[nn.Module], name: str, source: str, names: Mapping[str, object]) -> type[nn.Module]:
    """Make the class of a source text; the same text over the same base gives the same class, as long as it is used."""
    key = (base, source, *sorted((name, id(value)) for name, value in names.items()))
    with _LOCK:
        made = _classes.get(key)
        if made is None:
            made = _classes[key] = _execute(base, name, source, names)
        return made


def _execute(base: type[nn.Module], name: str, source: str, names: Mapping[str, object]) -> type[nn.Module]:
    module = types.ModuleType(_choose_name(base, name, source))
    file = module.__file__ = f"<{module.__name__}>"
    vars(module).update(names)
    vars(module)[base.__name__] = base
    try:
        exec(compile(source, file, "exec"), vars(module))  # noqa: S102  our own code, from the plan
    except Exception as error:
        message = f"no class can be derived from {base.__qualname__} ({error}); exclude its modules"
        raise ModelError(message) from error
    made: type[nn.Module] = vars(module).pop(name)  # the module stays for as long as the class, and must not keep it
    made._se_inject_code = (base, name, source, dict(names))  # type: ignore[attr-defined]
    made.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[module.__name__] = module
    weakref.finalize(made, _forget, module.__name__, file).atexit = False
    return made


def _choose_name(base: type[nn.Module], name: str, source: str) -> str:
    """Name a module after what is in it: the same in every process, for what is exported holds the name."""
    identity = repr((base.__module__, base.__qualname__, source)).encode()
    chosen = f"{_GENERATED}.{name}_{hashlib.sha256(identity).hexdigest()[:8]}"
    others = (f"{chosen}_{i}" for i in itertools.count(2))  # of another class of that name, from the same function
    return next(option for option in itertools.chain([chosen], others) if option not in sys.modules)


def _forget(module: str, file: str) -> None:
    sys.modules.pop(module, None)
    linecache.cache.pop(file, None)


def _reduce(self: nn.Module, protocol: int) -> Any:
    """Pickle an instance of a generated class: the class is made anew from its base and its source."""
    cls: type[nn.Module] = next(c for c in type(self).__mro__ if "_se_inject_code" in vars(c))
    last = cls  # of the generated ones, each of which would come back to here
    while "_se_inject_code" in vars(last._se_inject_code[0]):  # type: ignore[attr-defined]
        last = last._se_inject_code[0]  # type: ignore[attr-defined]
    reduced: Any = super(last, self).__reduce_ex__(protocol)
    if type(self) is not cls:
        return reduced  # an instance of somebody's subclass, pickled like any other
    constructor, args, *rest = reduced
    if args[:1] != (cls,):
        raise TypeError(f"{cls.__name__} cannot be pickled: {get_base(cls).__name__} defines a __reduce__ of its own")
    return (_restore, (_write_code(cls), constructor, *args[1:]), *rest)


def _write_code(cls: type[nn.Module]) -> Any:
    """Write a class as what it is made of, down to a class that is no generated one."""
    if "_se_inject_code" not in vars(cls):
        return cls
    base, name, source, names = cls._se_inject_code  # type: ignore[attr-defined]
    modules = {key: value.__name__ for key, value in names.items() if isinstance(value, types.ModuleType)}
    others = {key: value for key, value in names.items() if key not in modules}
    return _write_code(base), name, source, others, modules


def _read_code(code: Any) -> type[nn.Module]:
    if isinstance(code, type):
        return code
    base, name, source, names, modules = code
    imported = {key: importlib.import_module(module) for key, module in modules.items()}
    return _make_class(_read_code(base), name, source, {**names, **imported})


def _restore(code: tuple[Any, ...], constructor: Any, *args: object) -> Any:
    return constructor(_read_code(code), *args)
