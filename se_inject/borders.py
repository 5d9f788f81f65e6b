"""Borders: methods that call the method of the base class, and do something with what goes in or comes out.

Takes a module, gives the source of a method. Executes nothing and changes no model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from se_inject.codegen import Method, write_parameters
from se_inject.errors import TraceError


def write_border(owner: nn.Module, name: str, gates: Mapping[str, str]) -> Method:
    """Write a method that calls the base's and gates what goes in or comes out.

    Args:
        owner: The module whose method it is; only looked at.
        name: The method.
        gates: The block's attribute by border, "input" or "output".

    Raises:
        TraceError: The method's signature cannot be written down.
    """
    signature = inspect.signature(getattr(owner, name))
    first, *rest = signature.parameters.values()
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise TraceError(f"its {name} takes no plain first argument")
    given = [first.name, *map(_hand_on, rest)]
    if "input" in gates:
        given[0] = f"self.{gates['input']}({first.name})"
    result = f"super().{name}({', '.join(given)})"
    if "output" in gates:
        result = f"self.{gates['output']}({result})"
    return Method(f"def {name}(self, {write_parameters(signature)}):\n    return {result}", {})


def write_scaled(owner: nn.Module, scale: str) -> Method:
    """Write a forward that scales what the base's forward gives; `scale` is code such as `2 *`."""
    method = write_border(owner, "forward", {})
    return Method(method.source.replace("return super()", f"return {scale} super()"), {})


def _hand_on(parameter: inspect.Parameter) -> str:
    prefixes: dict[object, str] = {
        parameter.VAR_POSITIONAL: "*",
        parameter.VAR_KEYWORD: "**",
        parameter.KEYWORD_ONLY: f"{parameter.name}=",
    }
    return prefixes.get(parameter.kind, "") + parameter.name
