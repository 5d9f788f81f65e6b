"""Naming: let the values of written code share variables, as a person does in `out = self.bn1(out)`.

Takes statements in which each value has a name of its own, renames the values in place. Knows nothing of graphs.
"""

from __future__ import annotations

import ast
import os.path
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_MIN_PREFIX = 3


@dataclass
class _Variable:
    """A variable of the written code: the values that hold it one after the other, from the first to the last use."""

    values: list[str]
    start: int
    end: int
    name: str = ""


def name_variables(statements: list[ast.stmt], parameters: set[str], reserved: set[str], layers: set[str]) -> None:
    """Let values share variables where their lives do not overlap, and name these.

    Args:
        statements: In which each value has a name of its own; these names are rewritten in place.
        parameters: Names of the method's parameters, which stay.
        reserved: Names that no variable may have.
        layers: Those of the values that a child gave, after which a variable is rather named.
    """
    loads = [get_loads(statement) for statement in statements]
    last_use = {name: i for i, names in enumerate(loads) for name in names}
    num_uses = Counter(name for names in loads for name in names)
    variables = {p: _Variable([p], 0, len(statements), p) for p in parameters}
    for i, statement in enumerate(statements):
        ending = [name for name in loads[i] if name in variables and last_use[name] == i]
        ending = [name for name in ending if name not in parameters or num_uses[name] == 1]
        if _joins_many(statement):
            ending = []
        for target in get_targets(statement):
            variable = variables[ending.pop(0)] if ending else _Variable([], i, i)
            variable.values.append(target)
            variable.end = max(variable.end, last_use.get(target, i))
            variables[target] = variable
    _choose_names(variables, reserved, layers)
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in variables:
                node.id = variables[node.id].name


def _joins_many(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement.value).startswith("torch.cat(")


def get_loads(statement: ast.stmt) -> list[str]:
    """List the variables that a statement reads, each once."""
    names = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        names.append(statement.target.id)
    return list(dict.fromkeys(names))


def _choose_names(variables: Mapping[str, _Variable], reserved: set[str], layers: set[str]) -> None:
    """Name a variable after what its layers have in common, as `branch3x3` of `branch3x3_1` and `branch3x3_2`."""
    chosen: list[_Variable] = []
    for variable in {id(v): v for v in variables.values()}.values():
        if not variable.name:
            telling = [v for v in variable.values if v in layers] or variable.values
            base = _find_common_name([v for v in telling if not v.startswith("getitem")])
            options = (base if i == 1 else f"{base}_{i}" for i in range(1, len(variables) + 2))
            overlapping = {v.name for v in chosen if v.start <= variable.end and variable.start <= v.end}
            variable.name = next(name for name in options if name not in overlapping | reserved)
        chosen.append(variable)


def _find_common_name(values: list[str]) -> str:
    prefix = os.path.commonprefix(values)  # noqa: RUF071  of characters is what is meant
    if prefix in values:
        return prefix
    prefix = prefix.rstrip("_")
    return prefix if len(prefix) >= _MIN_PREFIX and prefix.isidentifier() else "out"


def get_targets(statement: ast.stmt) -> list[str]:
    """List the variables that a statement assigns."""
    if not isinstance(statement, ast.Assign):
        return []
    return [
        node.id
        for node in ast.walk(statement.targets[0])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
