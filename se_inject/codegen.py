"""Code generation: write a traced graph as Python that reads like a person's.

Takes the graphs of a method (one, or one a mode), gives the source of the method and the names that it uses. torch.fx
writes one fresh name a value; here a value takes over the name of an operand that is no longer needed, as in
`out = self.bn1(out)`. Executes nothing and changes no model.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional
from torch import Tensor, fx, nn

from se_inject.errors import TraceError
from se_inject.naming import get_loads, get_targets, name_variables
from se_inject.tracing import Trace


@dataclass(frozen=True)
class Method:
    """The source of a method, the objects behind its global names, and the statements that refuse other arguments."""

    source: str
    names: Mapping[str, object]
    guards: tuple[str, ...] = ()


def write_method(owner: nn.Module, traces: Sequence[Trace]) -> Method:
    """Write the method whose graphs (one, or eval and train) are given.

    Args:
        owner: The module whose method it is; only looked at.
        traces: The edited graphs. With two, the method branches on `self.training`.

    Raises:
        TraceError: The method's signature cannot be written down.
    """
    names: dict[str, object] = {}
    bodies = {trace.training: _write_body(owner, trace, names) for trace in traces}
    first = traces[0]
    body = bodies[first.training]
    if len(bodies) > 1:
        test = ast.parse("self.training", mode="eval").body
        body = [ast.If(test=test, body=bodies[True], orelse=bodies[False])]
    function = ast.parse(f"def {first.entry.method}(self, {write_parameters(first.signature)}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    guards = _write_guards(first)
    function.body = [*guards, *body]
    source = ast.unparse(ast.fix_missing_locations(function))
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    names = {name: value for name, value in names.items() if name in used}
    return Method(source, names, tuple(map(ast.unparse, guards)))


def write_class(name: str, base: str, docstring: str, methods: Sequence[Method]) -> str:
    """Write a subclass of `base` that has the given methods."""
    return f'class {name}({base}):\n    """{docstring}"""\n\n' + "\n".join(map(indent_method, methods))


def indent_method(method: Method) -> str:
    """Write a method as it stands in a class."""
    return "".join(f"    {line}\n" for line in method.source.splitlines())


def write_parameters(signature: inspect.Signature) -> str:
    """Write the parameters of a method, without `self` and annotations.

    Raises:
        TraceError: A default is no plain value.
    """
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty and not _is_plain(default):
            raise TraceError(
                f"the default of its argument {parameter.name!r} is a {type(default).__name__}, not a plain value"
            )
        parameters.append(parameter.replace(annotation=parameter.empty))
    return str(inspect.Signature(parameters))[1:-1]


def _write_guards(trace: Trace) -> list[ast.stmt]:
    """Refuse other values of the arguments that the traced code read; what it did not read does not matter."""
    read = _get_read_names(trace.method)
    kinds = {parameter.kind for parameter in trace.signature.parameters.values()}
    read |= set(trace.fixed) if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} else set()
    guards: list[ast.stmt] = []
    for name, value in trace.fixed.items():
        if name in read:
            different = "is not" if value is None or isinstance(value, bool) else "!="
            message = f"the rewritten {trace.entry.method} holds for {name}={value!r} alone"
            guards += ast.parse(f"if {name} {different} {value!r}:\n    raise ValueError({message!r})").body
    for name, form in trace.opened.items():
        found = f"len({name}) != {form}" if isinstance(form, int) else f"list({name}) != {form!r}"
        message = f"the rewritten {trace.entry.method} holds for a {name} of {form} maps alone"
        guards += ast.parse(f"if {found}:\n    raise ValueError({message!r})").body
    return guards


def _get_read_names(method: Callable[..., Any]) -> set[str]:
    names: set[str] = set()
    for instruction in dis.get_instructions(inspect.unwrap(method)):
        if instruction.opname.startswith("LOAD") and instruction.argval is not None:
            names.update(instruction.argval if isinstance(instruction.argval, tuple) else [str(instruction.argval)])
    return names


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def _write_body(owner: nn.Module, trace: Trace, names: dict[str, object]) -> list[ast.stmt]:
    for part in (part for node in trace.graph.nodes for part in str(node.target).split(".")):
        if part.startswith("__") and not part.endswith("__"):
            raise TraceError(f"the name {part!r} of a child would be mangled in a class")
    code = trace.graph.python_code("self")
    taken = {*trace.signature.parameters, *code.globals, type(owner).__name__}
    has_functional = "F" not in taken
    plain = _unmangle(code.globals, taken)
    names.update((plain.get(name, name), value) for name, value in code.globals.items())
    if has_functional:
        names["F"] = torch.nn.functional
    try:
        function = next(node for node in ast.parse(code.src).body if isinstance(node, ast.FunctionDef))
    except SyntaxError as error:
        raise TraceError(f"the name of a child cannot be written as code: {(error.text or '').strip()}") from error
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = plain.get(node.id, node.id)
    prettify = _Prettify(owner, has_functional=has_functional)
    statements = [prettify.visit(s) for s in map(_strip_annotation, function.body) if not _is_release(s)]
    plain_reads = {n.name for n in trace.graph.nodes if n.op == "get_attr" and not isinstance(n.meta["value"], Tensor)}
    statements = _inline_reads(statements, plain_reads)
    reserved = {"self", *trace.signature.parameters, *names, *dir(builtins)}
    parameters = {argument.arg for argument in function.args.args}
    unpacked = _find_unpacked(trace.graph)
    statements = _unpack(statements, unpacked)
    statements = _write_effects(statements)
    layers = {node.name for node in trace.graph.nodes if node.op == "call_module"} - unpacked.keys()
    name_variables(statements, parameters, reserved, layers)
    statements = [s for s in statements if not _is_self_assignment(s)]
    return _inline_return(statements)


def _unmangle(names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Rename globals, such as a class of `__main__`, that Python would take for private ones of the class."""
    mangled = [name for name in names if name.startswith("__") and not name.endswith("__")]
    return {name: name.lstrip("_") + "_" * (name.lstrip("_") in taken) for name in mangled}


def _strip_annotation(statement: ast.stmt) -> ast.stmt:
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.Assign(targets=[statement.target], value=statement.value)
    return statement


def _is_release(statement: ast.stmt) -> bool:
    """Tell whether the statement is torch.fx's `x = None`, which frees a value; taking over names does the same."""
    is_none = isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    return is_none and statement.value.value is None  # type: ignore[attr-defined]


def _is_self_assignment(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, (ast.Name, ast.Tuple)):
        return False
    return ast.unparse(statement.targets[0]) == ast.unparse(statement.value)


class _Prettify(ast.NodeTransformer):
    """Write `F.relu`, `self.layers[0]` and `x[:, :8]` where torch.fx spells them out."""

    def __init__(self, owner: nn.Module, *, has_functional: bool) -> None:
        self._owner, self._has_functional = owner, has_functional

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        is_candidate = self._has_functional and node.attr == "functional"
        return ast.Name("F", ast.Load()) if is_candidate and ast.unparse(node) == "torch.nn.functional" else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "slice":
            return ast.Slice(*(None if ast.unparse(a) == "None" else self.visit(a) for a in node.args))
        path = _get_module_path(node)
        self.generic_visit(node)
        if path and path[-1].isdigit():
            parent = self._owner.get_submodule(".".join(path[:-1]))
            # A slice of a Sequential keeps the names of its layers, so a name need not be the position.
            is_list = isinstance(parent, (nn.Sequential, nn.ModuleList))
            if is_list and [*parent._modules].index(path[-1]) == int(path[-1]):
                return ast.Subscript(value=node.args[0], slice=ast.Constant(int(path[-1])), ctx=ast.Load())
        return node


def _get_module_path(node: ast.AST) -> list[str]:
    """Return the path that `getattr(self.a, "0").b` names, empty for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return [node.attr]
    if isinstance(node, ast.Attribute) and (path := _get_module_path(node.value)):
        return [*path, node.attr]
    is_getattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
    if is_getattr and isinstance(node.args[1], ast.Constant):  # type: ignore[attr-defined]
        target, name = node.args  # type: ignore[attr-defined]
        path = _get_module_path(target)
        return [*path, name.value] if path or ast.unparse(target) == "self" else []
    return []


def _find_unpacked(graph: fx.Graph) -> dict[str, int]:
    """Find the results that the code took apart and whose items follow, all of them; give how many there are."""
    found = {}
    for node in graph.nodes:
        num = node.meta.get("unpacked", 0)
        following = list(itertools.islice(_follow(node), num))
        items = [(operator.getitem, (node, i)) for i in range(num)]
        if num and [(x.target, x.args) for x in following] == items and len(node.users) == num:
            found[node.name] = num
    return found


def _follow(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _unpack(statements: list[ast.stmt], unpacked: Mapping[str, int]) -> list[ast.stmt]:
    """Write `a, b = self.se(a, b)` for a result and the items taken from it."""
    rest = iter(statements)
    written = []
    for statement in rest:
        targets = get_targets(statement)
        if targets and targets[0] in unpacked:
            assert isinstance(statement, ast.Assign)
            items = [get_targets(next(rest))[0] for _ in range(unpacked[targets[0]])]
            statement.targets = [ast.Tuple([ast.Name(item, ast.Store()) for item in items], ast.Store())]
        written.append(statement)
    return written


def _write_effects(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Write `x.append(y)` without a name for its result, where the result is not used."""
    used = {name for statement in statements for name in get_loads(statement)}
    written: list[ast.stmt] = []
    for statement in statements:
        targets = get_targets(statement)
        if not isinstance(statement, ast.Assign) or not targets or used & set(targets):
            written.append(statement)
        elif not isinstance(statement.value, ast.Name):
            written.append(ast.Expr(statement.value))
    return written


def _inline_reads(statements: list[ast.stmt], names: set[str]) -> list[ast.stmt]:
    """Write `self.p` where it is used for `p = self.p`, whose value is a plain one."""
    reads = {get_targets(s)[0]: s.value for s in statements if isinstance(s, ast.Assign) and get_targets(s)}
    reads = {name: value for name, value in reads.items() if name in names}

    class Inline(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return reads.get(node.id, node) if isinstance(node.ctx, ast.Load) else node

    return [Inline().visit(s) for s in statements if not names.intersection(get_targets(s))]


def _inline_return(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Write `return self.relu(out)` for `out = self.relu(out); return out`."""
    if len(statements) > 1 and isinstance(last := statements[-1], ast.Return) and isinstance(last.value, ast.Name):
        before = statements[-2]
        if isinstance(before, ast.Assign) and ast.unparse(before.targets[0]) == last.value.id:
            return [*statements[:-2], ast.Return(before.value)]
    return statements
