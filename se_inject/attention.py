"""Attention: make the block of a site, our own or another channel attention.

Takes a site and its plan, gives a module that is an exact identity. Another attention than our own is made one by
`identity`, or refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from se_inject.block import SqueezeExcite, count_hidden
from se_inject.errors import OptionError
from se_inject.identity import make_identity
from se_inject.plan import SE, Plan, Site


@dataclass(frozen=True)
class Recipe:
    """How the blocks of a kind other than our own are made.

    Attributes:
        name: The name in timm's `create_attn`, or `module:qualname` of a user's factory.
        build: Makes a module for a site and its plan.
    """

    name: str
    build: Callable[[Site, Plan], nn.Module]


def find_recipe(block: str | Callable[[int], nn.Module]) -> Recipe | None:
    """Find how blocks are made; None for our own.

    Raises:
        OptionError: There is no attention of this name, or it is no function.
    """
    if block == SE:
        return None
    if isinstance(block, str):
        return Recipe(block, _find_timm(block))
    if not callable(block) or isinstance(block, nn.Module):
        raise OptionError(f"block is a {type(block).__name__}; give a name or a function that takes a channel count")
    name = f"{getattr(block, '__module__', '')}:{getattr(block, '__qualname__', type(block).__name__)}"
    return Recipe(name, lambda site, _: block(site.channels))


def make_block(
    site: Site,
    plan: Plan,
    recipe: Recipe | None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make the block of a site, an exact identity.

    Raises:
        OptionError: The attention cannot be made an exact identity; the message says why.
    """
    if recipe is None:
        return SqueezeExcite(
            site.channels,
            site.r,
            divisor=plan.divisor,
            bias=plan.bias,
            squeeze=plan.squeeze,
            gate=plan.gate,
            num_spatial=site.num_spatial,
            channel_dim=site.channel_dim,
            device=device,
            dtype=dtype,
        )
    return make_identity(_build(site, plan, recipe), site.channels, recipe.name).to(device=device, dtype=dtype)


def count_block(site: Site, plan: Plan, recipe: Recipe | None) -> Site:
    """Fill in what the block of a site has: hidden channels and parameters.

    Raises:
        OptionError: The attention cannot be made an exact identity; the message says why.
    """
    if recipe is None:
        hidden = count_hidden(site.channels, site.r, divisor=plan.divisor)
        biases = hidden + site.channels if plan.bias else 0
        return replace(site, hidden=hidden, num_parameters=2 * site.channels * hidden + biases)
    block = make_block(site, plan, recipe)
    return replace(site, hidden=0, num_parameters=sum(p.numel() for p in block.parameters()))


def _build(site: Site, plan: Plan, recipe: Recipe) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            block = recipe.build(site, plan)
    except Exception as error:
        raise OptionError(f"block {recipe.name} cannot be made for {site.channels} channels: {error}") from error
    if not isinstance(block, nn.Module):
        raise OptionError(f"block {recipe.name} gave a {type(block).__name__}; it must give a torch.nn.Module")
    return block


def _find_timm(name: str) -> Callable[[Site, Plan], nn.Module]:
    from timm.layers import get_attn

    try:
        kind: Any = get_attn(name) if name else None
    except AssertionError:
        kind = None
    if kind is None:
        raise OptionError(
            f"block is {name!r}; it must be se, a name of timm's create_attn (eca, ge, gc, cbam, ...), or in Python a "
            f"function that makes a module for a number of channels"
        )
    if name == "ge":
        kind = _make_gather_excite
    known = inspect.signature(kind).parameters

    def build(site: Site, plan: Plan) -> nn.Module:
        options = {"rd_ratio": 1 / site.r, "rd_divisor": plan.divisor}
        made: nn.Module = kind(site.channels, **{k: v for k, v in options.items() if k in known})
        return made

    return build


def _make_gather_excite(channels: int, rd_ratio: float, rd_divisor: int) -> nn.Module:
    """Make a gather-excite block (GE-theta of global extent); timm 1.0.31 fails to build the layers of its own."""
    from timm.layers import ConvMlp, GatherExcite, make_divisible

    block: nn.Module = GatherExcite(channels, use_mlp=False)
    hidden = make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
    block.mlp = ConvMlp(channels, hidden, act_layer=nn.ReLU)
    return block
