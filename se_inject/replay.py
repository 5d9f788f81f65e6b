"""Replay: find again in a network what a plan says.

Takes a network and its plan, gives the `Survey` that the plan was made from, or refuses it. The network is not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from se_inject.attention import Recipe, count_block, find_recipe
from se_inject.calls import METHODS, Entry, decode_call
from se_inject.errors import PlanError, TraceError
from se_inject.inspection import inspect_border, inspect_entry
from se_inject.layers import LAYER_SIDES
from se_inject.places import Place
from se_inject.plan import Plan, Site
from se_inject.planner import Survey
from se_inject.twin import check_model, make_twin

_MAX_DIVISOR = 4096
"""Hidden channels are at least as many, and so bound what a plan from a file can make us build."""


@torch.inference_mode(False)
def replay_plan(model: nn.Module, plan: Plan, *, block: Callable[[int], nn.Module] | None = None) -> Survey:
    """Trace the owners that a plan names, from the calls that it recorded; the network is not run.

    Args:
        model: The network.
        plan: The plan.
        block: Makes the blocks, where the plan was made with a factory of the user's.

    Raises:
        ModelError: The model cannot be changed.
        PlanError: The plan was made for another network.
    """
    check_model(model)
    recipe = find_recipe(block or plan.block)
    twin = make_twin(model)
    inspections = {}
    if Entry("").key not in plan.calls:
        raise PlanError("the plan does not say what the network is called with; make a new one")
    if not 1 <= plan.divisor <= _MAX_DIVISOR or len({site.path for site in plan.sites}) < len(plan.sites):
        raise PlanError(f"the plan has two sites of one name, or a divisor beyond 1 to {_MAX_DIVISOR}; make a new one")
    for entry, sites in plan.iterate_entries():
        where = f"the plan does not fit {type(model).__name__} at {entry}"
        if entry.method not in METHODS:
            raise PlanError(f"{where}: {entry.method} is none of {', '.join(METHODS)}")
        try:
            call = decode_call(plan.calls[entry.key], twin)
            is_border = any(site.is_border for site in sites)
            inspections[entry] = (
                inspect_border(twin, entry, call) if is_border else inspect_entry(twin, entry, call, plan.placing)
            )
            places = inspections[entry].places
            difference = next(filter(None, (_compare(site, places, plan, recipe) for site in sites)), "")
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, TraceError) as error:
            raise PlanError(f"{where}: {error}; make a new one") from error
        if difference:
            raise PlanError(f"{where}: {difference}; make a new one")
    return Survey(plan, twin, inspections, recipe)


def _compare(site: Site, places: list[Place], plan: Plan, recipe: Recipe | None) -> str:
    """Tell in what a site of a plan differs from the places that the network has."""
    place = places[site.index] if 0 <= site.index < len(places) else None
    if place is None:
        return f"it says {site.kind} number {site.index}, found {len(places)} places"
    if (place.num_spatial, place.channel_dim) != (site.num_spatial, site.channel_dim):
        return "the maps have other dimensions"
    expected = next((sides for kind, sides in LAYER_SIDES.items() if kind == site.kind), (site.kind,))
    is_expected = place.kind == "input" if site.is_border and site.kind not in LAYER_SIDES else place.kind in expected
    if not is_expected or place.channels != site.channels:
        return f"it says {site.kind} of {site.channels} channels, found {place.kind} of {place.channels}"
    if not 1 <= site.r < math.inf or site != count_block(site, plan, recipe):
        return f"{site.hidden} hidden channels are not what r={site.r:g} gives"
    return place.reason
