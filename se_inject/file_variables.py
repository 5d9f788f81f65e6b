"""File variables: what a method reads and writes in the file that defines it, once it stands in another one.

Takes the syntax tree of a method and its function, changes the tree so that variables of the file are found there. What
the file defines or imports (modules, classes, functions) is left to whoever moves the method. Executes nothing.
"""

from __future__ import annotations

import ast
import builtins
import dis
import keyword
import sys
from types import BuiltinFunctionType, FunctionType, ModuleType

from se_inject.errors import TraceError

_FIXED = (ModuleType, type, FunctionType, BuiltinFunctionType)
"""What a file defines or imports, and does not set anew."""


def read_from_file(tree: ast.FunctionDef, function: FunctionType, doubt: str) -> dict[str, object]:
    """Let a method read and write its file's variables there, as `file.LINE`, for code may set them later.

    Modules, classes and functions stay what they are.

    Returns:
        The file by its name in the method; empty if it has no use.

    Raises:
        TraceError: A name is a variable of the file's and another one too.
    """
    file = sys.modules.get(function.__module__)
    if file is None or vars(file) is not function.__globals__:
        return {}
    written = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    own = {*function.__code__.co_varnames, *(get_stored(tree) - written)}
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}.intersection(function.__globals__) - own
    variables = written | {n for n in loaded if not isinstance(function.__globals__[n], _FIXED)}
    read = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    if any(not isinstance(function.__globals__.get(n), _FIXED) for n in read.intersection(own)):
        raise TraceError(doubt)  # a comprehension has a variable of this name too
    if not variables:
        return {}
    taken = {*own, *function.__globals__, *dir(builtins)}
    base = file.__name__.rpartition(".")[2].strip("_")
    options = (base, f"{base}_file", *(f"file_{i}" for i in range(len(taken) + 1)))  # a file may be called my-net.py
    name = next(n for n in options if n.isidentifier() and not keyword.iskeyword(n) and n not in taken)

    class Read(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Attribute(ast.Name(name, ast.Load()), node.id, node.ctx) if node.id in variables else node

        def visit_Global(self, node: ast.Global) -> ast.AST:  # noqa: ARG002
            return ast.Pass()

    Read().visit(tree)
    tree.body = [statement for statement in tree.body if not isinstance(statement, ast.Pass)]
    return {name: file}


def get_stored(tree: ast.AST) -> set[str]:
    """List the names that code gives a value to, its arguments and inner functions among them."""
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    return (
        stored
        | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    )
