"""Frames: which expression of the user's code is being traced, and where it stands.

Looks at Python's own frames from within a recorded operation. Changes nothing.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
from types import CodeType, FrameType
from typing import Any

from torch import nn


def find_user_frame() -> FrameType | None:
    """Return the innermost frame that is neither torch's nor ours."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "se_inject.")):
        frame = frame.f_back
    return frame


def runs_childs_method(code: CodeType, owner: nn.Module) -> bool:
    """Tell whether an owner's code has called into a child, not as a leaf, whose code reads its own `training`.

    Args:
        code: Of the owner's method that is being traced.
        owner: Whose `training` is a proxy; a child's is not.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        first = frame.f_code.co_varnames[:1]
        if "training" in frame.f_code.co_names and first:
            module = frame.f_locals.get(first[0])
            if issubclass(type(module), nn.Module) and module is not owner:
                return True
        frame = frame.f_back
    return False


def find_place(frame: FrameType | None) -> tuple[CodeType, tuple[int | None, ...]] | None:
    """Find the code that is being traced, and the lines and columns of its expression (Python 3.11 and later tell)."""
    if frame is None or not hasattr(frame.f_code, "co_positions"):
        return None
    return frame.f_code, next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))


def read_user_code(frame: FrameType | None) -> str:
    """Read the expression of the user's code that is being traced; empty if its line is not one statement."""
    line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    try:
        statement: Any = ast.parse(line.removeprefix("return ")).body[0]
        while body := getattr(statement, "body", None):  # of `if self.has_shortcut: y = x + y`
            (statement,) = body
    except (SyntaxError, IndexError, ValueError, TypeError):
        return ""
    is_more = isinstance(statement, (ast.Assign, ast.Return)) and statement.value
    return ast.unparse(statement.value if is_more else statement)
