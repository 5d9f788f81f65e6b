"""Budget: what the blocks of a search may cost, and how it is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from se_inject.errors import OptionError

Resource = Literal["parameters", "latency"]
UNITS = {"parameters": "parameters", "latency": "ms"}


@dataclass(frozen=True)
class Budget:
    """What all blocks together may cost.

    Attributes:
        amount: How much.
        is_share: Whether `amount` is in per cent of the network without blocks, and not in parameters or milliseconds.
        resource: Of what.
    """

    amount: float
    is_share: bool = True
    resource: Resource = "parameters"

    @classmethod
    def parse(cls, text: str, resource: str = "parameters") -> Budget:
        """Read `5%`, or a number of parameters or of milliseconds.

        Raises:
            OptionError: It is something else.

        Example:
            >>> Budget.parse("5%"), Budget.parse("0.5", "latency")
            (Budget(amount=5.0, is_share=True, resource='parameters'), \
Budget(amount=0.5, is_share=False, resource='latency'))
        """
        if resource not in get_args(Resource):
            raise OptionError(f"--of is {resource!r}; expected {' or '.join(get_args(Resource))}")
        number = text.strip().removesuffix("%")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not 0 < amount < math.inf:
            raise OptionError(f"--budget is {text!r}; expected a share as in 5%, or a number of {UNITS[resource]}")
        return cls(amount, number != text.strip(), resource)  # type: ignore[arg-type]  # it was looked up


def spend(values: Mapping[str, float], costs: Mapping[str, float], limit: float) -> set[str]:
    """Spend a budget: what is worth most for its cost comes first, and what no longer fits is left out.

    Example:
        >>> sorted(spend({"a": 3, "b": 2, "c": 1}, {"a": 4, "b": 1, "c": 1}, 3))
        ['b', 'c']
    """
    chosen: set[str] = set()
    spent = 0.0
    for path in sorted(values, key=lambda path: -values[path] / costs[path]):
        if spent + costs[path] <= limit * (1 + 1e-9):
            chosen.add(path)
            spent += costs[path]
    return chosen
