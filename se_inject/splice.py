"""Splicing: put the call of a block into a method's own source, where a graph would not do all that the code does.

Takes a trace that is in doubt (a condition on the size, a cache, a switch of modes) and its places, gives the merges
whose block can be written into the source as it stands, and that source. The method keeps every line that it has: only
the operand of a merge is wrapped, `shortcut + self.drop_path(self.se(x))`, or where a sum is written on it,
`out = self.se(out)` stands before `out += shortcut`. Executes nothing and changes no model.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType

from torch import fx, nn

from se_inject.codegen import Method, write_parameters
from se_inject.errors import TraceError
from se_inject.file_variables import get_stored, read_from_file
from se_inject.functions import ADDITIONS, CONCATENATIONS
from se_inject.hazards import get_ancestors, get_descendants
from se_inject.instructions import lists_children
from se_inject.operations import is_map
from se_inject.places import Place
from se_inject.sums import get_storage, list_tensors
from se_inject.tracing import Trace


@dataclass(frozen=True)
class Splice:
    """Where a block goes.

    Attributes:
        expression: Where the merge stands in the source: first and last line, first and last column.
        operands: Which of its operands are gated, in order and side by side.
        num_operands: How many it has.
        layer: The layer whose argument is gated instead, as in `self.drop_path(self.se(x))`; empty for none.
    """

    expression: tuple[int, int, int, int]
    operands: tuple[int, ...]
    num_operands: int
    layer: str = ""


def keep_spliceable(owner: nn.Module, trace: Trace, places: list[Place]) -> list[Place]:
    """Keep the merges before which a block can be written; the other places have the trace's doubt as their reason.

    Merges that one line runs, as in a loop, share a block and are one place.
    """
    groups: dict[object, list[Place]] = {}
    for place in places:
        expression = _get_expression(trace, place) if place.operations else None
        groups.setdefault(expression or id(place), []).append(place)
    kept = [place for group in groups.values() for place in _join(owner, trace, group)]
    return [replace(place, index=i) for i, place in enumerate(kept)]


def _join(owner: nn.Module, trace: Trace, group: list[Place]) -> list[Place]:
    if all(place.reason for place in group):
        return group
    first = group[0]
    try:
        splices = {_find_splice(trace, place) for place in group}
        splice_method(owner, trace, [("se", first)])
    except TraceError:
        splices = set()
    if len(splices) != 1 or len({(p.kind, p.channels, p.num_spatial, p.channel_dim, p.reason) for p in group}) > 1:
        # A merge without code to show is one that was not followed.
        return [p if p.reason else replace(p, reason=trace.doubt, code="") for p in group]
    operations = tuple(name for place in group for name in place.operations)
    return [replace(first, operations=operations, num_merges=sum(place.num_merges for place in group))]


def splice_method(owner: nn.Module, trace: Trace, blocks: Sequence[tuple[str, Place]]) -> Method:
    """Write the source of a method with its blocks in it.

    Args:
        owner: The module whose method it is; only looked at.
        trace: The trace in doubt.
        blocks: The name of each block, and the merge that it stands before.

    Raises:
        TraceError: The source is not to be had, or the merge is written in a way that has no room for a block.
    """
    function = _get_function(owner, trace)
    if lists_children(type(owner), trace.entry.method):
        raise TraceError(trace.doubt)
    tree = _parse(function, trace.doubt)
    splices = [(name, _find_splice(trace, place)) for name, place in blocks]
    found = [(name, splice, _find_expression(tree, splice, trace.doubt)) for name, splice in splices]
    for name, splice, expression in found:
        if isinstance(expression, ast.AugAssign) and splice.operands == (0,):
            _gate_before(tree, expression, name, trace.doubt)
        else:
            _wrap(expression, name, splice, trace.doubt)
    tree.name, tree.args = trace.entry.method, _parse_parameters(trace)
    tree.decorator_list, tree.returns = [], None
    if ast.get_docstring(tree) is not None and len(tree.body) > 1:
        del tree.body[0]
    file_names = read_from_file(tree, function, trace.doubt)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(function.__code__.co_varnames)
    names = {name: function.__globals__[name] for name in sorted(used) if name in function.__globals__} | file_names
    if names.get(type(owner).__name__, type(owner)) is not type(owner):
        raise TraceError(trace.doubt)
    if any(name not in names and not hasattr(builtins, name) for name in used - get_stored(tree)):
        raise TraceError(trace.doubt)
    return Method(ast.unparse(ast.fix_missing_locations(tree)), names)


def _get_function(owner: nn.Module, trace: Trace) -> FunctionType:
    """Return the plain function that the method is; a decorated one does more than its source says."""
    function = getattr(getattr(owner, trace.entry.method), "__func__", None)
    if not isinstance(function, FunctionType) or function is not trace.method or function.__code__.co_freevars:
        raise TraceError(trace.doubt)
    if isinstance(owner, fx.GraphModule) or function.__code__.co_varnames[:1] != ("self",):
        raise TraceError(trace.doubt)
    return function


def _parse(function: FunctionType, doubt: str) -> ast.FunctionDef:
    """Parse the source of a function, with the lines and columns of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse("if True:\n" + "".join(lines) if lines[0][:1].isspace() else "\n" + "".join(lines))
    except (OSError, SyntaxError, TypeError) as error:
        raise TraceError(doubt) from error
    tree = ast.increment_lineno(tree, first - 2)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    mangled = {
        name
        for node in ast.walk(tree)
        for name in (getattr(node, "id", ""), getattr(node, "attr", ""))
        if name.startswith("__") and not name.endswith("__")
    }
    if not found or found[0].name != function.__name__ or mangled:
        raise TraceError(doubt)
    return found[0]


def _parse_parameters(trace: Trace) -> ast.arguments:
    function = ast.parse(f"def f(self, {write_parameters(trace.signature)}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _get_expression(trace: Trace, place: Place) -> tuple[int, int, int, int] | None:
    """Return where a merge stands in the method's own source, if it is written there and Python tells."""
    node = next(node for node in trace.graph.nodes if node.name == _get_operation(trace, place)[0].name)
    code, found = node.meta.get("place") or (None, None)
    is_own = code is getattr(trace.method, "__code__", None) and found is not None and None not in found
    return found if is_own else None


def _get_operation(trace: Trace, place: Place) -> tuple[fx.Node, list[fx.Node]]:
    """Return the operation of a merge that takes its branches, and those of its operands that are or hold them."""
    nodes = {node.name: node for node in trace.graph.nodes}
    operations = [nodes[name] for name in place.operations]
    operands: list[fx.Node] = []
    chosen = operations[-1]
    for edge in place.edges:
        source, consumer = nodes[edge.node], nodes[edge.consumers[0]]
        for operation in operations if len(edge.consumers) == 1 else ():
            if consumer is operation:
                chosen, operand = operation, source
                break
            holding = [x for x in operation.all_input_nodes if x not in operations and consumer in get_ancestors(x)]
            if len(holding) == 1 and not _has_layers(consumer, holding[0]):
                chosen, operand = operation, holding[0]
                break
        else:
            return chosen, []
        operands.append(operand)
    return chosen, operands


def _has_layers(first: fx.Node, last: fx.Node) -> bool:
    """Tell whether there are layers from one node to another: what is gated before them is not what is gated after."""
    return any(node.meta["work"].layers for node in get_ancestors(last) & get_descendants(first))


def _find_splice(trace: Trace, place: Place) -> Splice:
    if not place.operations:
        raise TraceError(trace.doubt)
    operation, operands = _get_operation(trace, place)
    expression = _get_expression(trace, place)
    name = getattr(operation.target, "__name__", str(operation.target))
    is_concat = name in CONCATENATIONS
    given = list(operation.args[0] if is_concat else operation.args)  # type: ignore[arg-type]
    types = {x.meta["value"].dtype for x in (*operands, *_get_layer_nodes(trace))}
    if expression is None or not operands or any(given.count(x) != 1 for x in operands) or len(types) > 1:
        raise TraceError(trace.doubt)
    indices = tuple(given.index(x) for x in operands)
    is_side_by_side = indices == tuple(range(indices[0], indices[0] + len(indices)))
    is_overwritten = name in ("iadd", "add_", "__iadd__") and indices != (1,)
    is_odd = not is_side_by_side or (not is_concat and len(indices) > 1)
    if is_odd or (is_overwritten and (name != "iadd" or not _is_new(operands[0]))):
        raise TraceError(trace.doubt)
    consumer = place.edges[0].consumers[0]
    is_layer = operands[0].name == consumer and operands[0].op == "call_module" and len(operands[0].args) == 1
    layer = str(operands[0].target) if is_layer and len(operands) == 1 and not operands[0].kwargs else ""
    return Splice(expression, indices, len(given), layer)


def _is_new(node: fx.Node) -> bool:
    """Tell whether a child made a map that has one reader and a place of its own."""
    before = {get_storage(x) for other in get_ancestors(node) - {node} for x in list_tensors(other)}
    made = {get_storage(x) for x in list_tensors(node)}
    return node.op == "call_module" and len(node.users) == 1 and not made & before


def _get_layer_nodes(trace: Trace) -> list[fx.Node]:
    """Return what the owner was handed, whose type its weights and a block's have too."""
    return [n for n in trace.graph.nodes if n.op == "placeholder" and is_map(n.meta["value"])]


def _find_expression(tree: ast.FunctionDef, splice: Splice, doubt: str) -> ast.AST:
    first, last, start, end = splice.expression
    kinds = (ast.BinOp, ast.AugAssign, ast.Call)
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        and (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == (first, last, start, end)
    ]
    # Within a switch of modes a block may get no gradient, or maps of another type than its weights are.
    switched = {id(n) for block in ast.walk(tree) if isinstance(block, ast.With) for n in ast.walk(block)}
    if len(found) != 1 or id(found[0]) in switched:
        raise TraceError(doubt)
    return found[0]


def _wrap(expression: ast.AST, name: str, splice: Splice, doubt: str) -> None:
    """Wrap the operands of a merge's expression in the call of a block."""
    [index, *_] = splice.operands
    block = f"self.{name}"
    if isinstance(expression, (ast.BinOp, ast.AugAssign)) and isinstance(expression.op, ast.Add):
        key = "value" if isinstance(expression, ast.AugAssign) else ("left", "right")[index]
        setattr(expression, key, _call(block, getattr(expression, key), splice.layer))
        return
    called = ast.unparse(expression.func) if isinstance(expression, ast.Call) else ""
    last = called.rpartition(".")[2]
    if not isinstance(expression, ast.Call) or (expression.keywords and not expression.args):
        raise TraceError(doubt)
    if last in CONCATENATIONS:
        expression.args[0] = _wrap_list(expression.args[0], block, splice, doubt)
    elif last in ADDITIONS and called == f"torch.{last}" and not _has_star(expression.args):
        expression.args[index] = _call(block, expression.args[index], splice.layer)
    elif last in ADDITIONS and isinstance(expression.func, ast.Attribute) and _is_single(expression.args):
        if index:
            expression.args[0] = _call(block, expression.args[0], splice.layer)
        else:
            expression.func.value = _call(block, expression.func.value, splice.layer)
    else:
        raise TraceError(doubt)


def _gate_before(tree: ast.FunctionDef, statement: ast.AugAssign, name: str, doubt: str) -> None:
    """Write `out = self.se(out)` before `out += x`, which writes on what the block gave then.

    Nothing but this variable may hold the map: it was assigned right before, and not read since.
    """
    bodies = (body for node in ast.walk(tree) for body in vars(node).values() if isinstance(body, list))
    body = next(body for body in bodies if statement in body)
    place = body.index(statement)
    variable = ast.unparse(statement.target)
    naming = [s for s in body[:place] if any(isinstance(n, ast.Name) and n.id == variable for n in ast.walk(s))]
    match naming[-1:]:
        case [ast.Assign(targets=[ast.Name(id=name_made)], value=ast.Call())] if name_made == variable:
            pass
        case _:
            raise TraceError(doubt)
    body[place:place] = ast.parse(f"{variable} = self.{name}({variable})").body


def _wrap_list(maps: ast.expr, block: str, splice: Splice, doubt: str) -> ast.expr:
    start, stop = splice.operands[0], splice.operands[-1] + 1
    is_single = stop - start == 1
    if isinstance(maps, (ast.List, ast.Tuple)) and not _has_star(maps.elts):
        if is_single:
            maps.elts[start] = _call(block, maps.elts[start], splice.layer)
            return maps
        gated = ast.Call(_parse_expression(block), maps.elts[start:stop], [])
        if stop - start == len(maps.elts):
            return gated
        maps.elts[start:stop] = [ast.Starred(gated, ast.Load())]
        return maps
    text = ast.unparse(maps)
    if stop - start == splice.num_operands and not is_single:
        return _parse_expression(f"{block}(*{text})")
    if not isinstance(maps, ast.Name):
        raise TraceError(doubt)  # it would be computed twice
    gated_text = f"{block}({text}[{start}])" if is_single else f"*{block}(*{text}[{start}:{stop}])"
    before = f"*{text}[:{start}], " if start else ""
    after = f", *{text}[{stop}:]" if stop < splice.num_operands else ""
    return _parse_expression(f"[{before}{gated_text}{after}]")


def _is_single(items: Sequence[ast.expr]) -> bool:
    return len(items) == 1 and not _has_star(items)


def _has_star(items: Iterable[ast.expr]) -> bool:
    return any(isinstance(item, ast.Starred) for item in items)


def _call(block: str, operand: ast.expr, layer: str) -> ast.expr:
    """Write `self.se(x)` for `x`, or `self.drop_path(self.se(x))` for `self.drop_path(x)`."""
    if layer and isinstance(operand, ast.Call) and ast.unparse(operand.func) == f"self.{layer}":
        operand.args[0] = ast.Call(_parse_expression(block), [operand.args[0]], [])
        return operand
    return ast.Call(_parse_expression(block), [operand], [])


def _parse_expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
