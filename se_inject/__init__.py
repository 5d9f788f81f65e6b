"""Retrofit squeeze-and-excitation blocks into trained CNNs, as an exact identity at the start.

`inject(model)` gives the network with its blocks; the README has the tour. torch is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from se_inject.adapters import disable_adapters as disable_adapters
    from se_inject.adapters import list_adapters as list_adapters
    from se_inject.adapters import load_adapter as load_adapter
    from se_inject.adapters import save_adapter as save_adapter
    from se_inject.adapters import set_adapter as set_adapter
    from se_inject.artifact import load as load
    from se_inject.artifact import save as save
    from se_inject.block import SqueezeExcite as SqueezeExcite
    from se_inject.ejection import eject as eject
    from se_inject.errors import SEInjectError as SEInjectError
    from se_inject.gate_statistics import collect_gates as collect_gates
    from se_inject.groups import freeze_backbone as freeze_backbone
    from se_inject.groups import param_groups as param_groups
    from se_inject.lean import plain_autograd as plain_autograd
    from se_inject.optimization import optimize as optimize
    from se_inject.plan import Plan as Plan
    from se_inject.plan import Site as Site
    from se_inject.planner import make_plan as make_plan
    from se_inject.publishing import push_to_hub as push_to_hub
    from se_inject.publishing import save_folder as save_folder
    from se_inject.rewrite import blocks as blocks
    from se_inject.rewrite import inject as inject
    from se_inject.standard import standardize as standardize

_HOMES = {
    "Plan": "plan",
    "SEInjectError": "errors",
    "Site": "plan",
    "SqueezeExcite": "block",
    "blocks": "rewrite",
    "collect_gates": "gate_statistics",
    "disable_adapters": "adapters",
    "eject": "ejection",
    "freeze_backbone": "groups",
    "inject": "rewrite",
    "list_adapters": "adapters",
    "load": "artifact",
    "load_adapter": "adapters",
    "make_plan": "planner",
    "optimize": "optimization",
    "param_groups": "groups",
    "plain_autograd": "lean",
    "push_to_hub": "publishing",
    "save": "artifact",
    "save_adapter": "adapters",
    "save_folder": "publishing",
    "set_adapter": "adapters",
    "standardize": "standard",
}
__all__ = [
    "Plan",
    "SEInjectError",
    "Site",
    "SqueezeExcite",
    "__version__",
    "blocks",
    "collect_gates",
    "disable_adapters",
    "eject",
    "freeze_backbone",
    "inject",
    "list_adapters",
    "load",
    "load_adapter",
    "make_plan",
    "optimize",
    "param_groups",
    "plain_autograd",
    "push_to_hub",
    "save",
    "save_adapter",
    "save_folder",
    "set_adapter",
    "standardize",
]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # to a type checker, a module with it has every name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'se_inject' has no attribute {name!r}")
        return getattr(importlib.import_module(f"se_inject.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
