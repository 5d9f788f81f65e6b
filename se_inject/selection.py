"""Selection: check the options, and filter the sites by path, stage and ratio.

Takes sites and the user's options, gives the sites that stay and the others with the reason. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

from se_inject.block import Gate, Squeeze, count_hidden
from se_inject.errors import OptionError
from se_inject.placements import Placement
from se_inject.places import Joining, Kind
from se_inject.plan import DEFAULT_R, SE, Options, PassedOver, Site

_CHOICES = {"placement": Placement, "concat": Joining, "squeeze": Squeeze, "gate": Gate}


def check_options(options: Options) -> None:
    """Refuse options out of their range.

    Raises:
        OptionError: One is; the message says which and what is expected.
    """
    divisor = options.divisor
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise OptionError(f"divisor is {divisor!r}; it must be a whole number of at least 1")
    for name, patterns in (("include", options.include), ("exclude", options.exclude)):
        if isinstance(patterns, str) or not isinstance(patterns, Iterable):
            raise OptionError(f"{name} is {patterns!r}; give a list of patterns, as in ['layer4.*']")
    for name, choices in _CHOICES.items():
        if getattr(options, name) not in get_args(choices):
            expected = ", ".join(get_args(choices))
            raise OptionError(f"{name} is {getattr(options, name)!r}; it must be one of {expected}")
    kinds = get_args(Kind)
    if isinstance(options.at, str) or not set(options.at) <= set(kinds):
        raise OptionError(f"at is {options.at!r}; it must be a list of {', '.join(kinds)}")
    if isinstance(options.stages, (str, int)) or not all(type(s) is int for s in options.stages):
        raise OptionError(f"stages is {options.stages!r}; give a list of numbers, as in [2, 3, 4]")
    if options.block != SE and (options.squeeze, options.gate, options.bias) != ("mean", "sigmoid", True):
        raise OptionError("squeeze, gate and bias are those of the block se; another block has its own")


def read_ratios(r: float | Mapping[str, float]) -> dict[str, float]:
    """Read the reduction ratio, for all or by pattern.

    Raises:
        OptionError: One is below 1, or no number.
    """
    ratios = dict(r) if isinstance(r, Mapping) else {"*": r}
    for pattern, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
            where = "" if pattern == "*" else f" for {pattern!r}"
            raise OptionError(f"r is {ratio!r}{where}; the reduction ratio must be a number of at least 1")
    return ratios


def set_ratios(sites: Sequence[Site], ratios: Mapping[str, float], divisor: int) -> list[Site]:
    """Give each site the ratio of the last pattern that it matches.

    Raises:
        OptionError: A pattern matches nothing, or a ratio that was chosen is larger than every map that it is for is
            wide.
    """
    for pattern in ratios:
        if pattern != "*":
            _check_pattern(pattern, sites)
    chosen = []
    widest: dict[float, int] = {}
    for site in sites:
        r = next((ratios[p] for p in reversed(list(ratios)) if _matches(site, p)), DEFAULT_R)
        widest[r] = max(widest.get(r, 0), site.channels)
        chosen.append(replace(site, r=r, hidden=count_hidden(site.channels, r, divisor=divisor)))
    for r, channels in widest.items():
        if r > channels and r != DEFAULT_R:
            raise OptionError(f"r is {r:g}, but the widest of its sites has {channels} channels; give a smaller r")
    return chosen


def filter_sites(sites: list[Site], options: Options) -> tuple[list[Site], list[PassedOver]]:
    """Keep the sites that the patterns and stages ask for, and say why the others go.

    Raises:
        OptionError: A pattern or a stage matches nothing.
    """
    include, exclude, stages = tuple(options.include), tuple(options.exclude), tuple(options.stages)
    for pattern in (*include, *exclude):
        _check_pattern(pattern, sites)
    known = sorted({site.stage for site in sites})
    for stage in stages:
        if sites and stage not in known:
            raise OptionError(f"stage {stage} has no sites; they are in stages {', '.join(map(str, known))}")
    kept: list[Site] = []
    dropped: list[PassedOver] = []
    for site in sites:
        excluding = [p for p in exclude if _matches(site, p)]
        if excluding:
            reason = f"excluded by {excluding[0]!r}"
        elif include and not any(_matches(site, p) for p in include):
            reason = "not included by " + ", ".join(map(repr, include))
        elif stages and site.stage not in stages:
            reason = "not in stages " + ", ".join(map(str, stages))
        elif options.skip_last_stage and site.stage == known[-1]:
            reason = f"in the last stage, {known[-1]}"
        else:
            kept.append(site)
            continue
        dropped.append(site.pass_over(reason))
    return kept, dropped


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.owner, pattern) or fnmatchcase(site.path, pattern)


def _check_pattern(pattern: str, sites: Sequence[Site]) -> None:
    if sites and not any(_matches(site, pattern) for site in sites):
        known = ", ".join(site.owner or "(root)" for site in sites[:3])
        raise OptionError(
            f"the pattern {pattern!r} matches none of the {len(sites)} sites ({known}, ...); give a path with * and ?"
        )
