"""The plan: which merges receive a block, and why the others do not.

Frozen dataclasses that are JSON both ways. A plan is what the user looks at before anything is cut, and what is
replayed when an artifact is loaded. `planner` makes them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from se_inject.block import Gate, Squeeze
from se_inject.calls import Entry
from se_inject.errors import PlanError
from se_inject.placements import Placement
from se_inject.places import Joining, Kind, Placing

PLAN_VERSION = 1
DEFAULT_R = 16.0
SE = "se"
"""The name of our own block."""
FOLDED = "its gate is folded into the layer beside it"
"""Why a place that had a block has none any more."""
_MANY = 2


@dataclass(frozen=True)
class Options:
    """What a plan is made with; see `make_plan`."""

    r: float | Mapping[str, float] = DEFAULT_R
    divisor: int = 8
    bias: bool = True
    squeeze: Squeeze = "mean"
    gate: Gate = "sigmoid"
    block: str | Callable[[int], nn.Module] = SE
    placement: Placement = "standard"
    concat: Joining = "joint"
    at: Iterable[Kind] = ()
    stages: Iterable[int] = ()
    skip_last_stage: bool = False
    include: Iterable[str] = ()
    exclude: Iterable[str] = ()


@dataclass(frozen=True)
class Site:
    """A place that receives a block: a merge, or (stage, conv, depthwise) a layer.

    Attributes:
        owner: Path of the module in whose code the merge is written; empty for the root.
        method: The owner's method that holds the merge.
        name: The attribute of the owner that holds the block.
        kind: residual, concat, fusion, stage, conv or depthwise.
        index: The place among those of the method, from 0.
        merge: The line of code (or the graph node) of the merge, or the layer.
        branches: The layers whose output is gated, relative to the owner.
        channels: Channels of all gated maps together.
        hidden: Outputs of the squeezing layer W1; 0 for a block of another kind.
        r: The reduction ratio.
        stage: How often the map is halved: it is `2 ** stage` times smaller than the input, so that a ResNet-50 has
            stages 2 to 5.
        num_parameters: Number of parameters of the block.
        is_border: Whether the block gates what the owner is handed or returns, and not what its code computes.
        num_merges: How many executed operations of the probe's pass the site stands for.
        num_spatial: How many spatial dimensions the maps have.
        channel_dim: Where the maps have their channels: 1, or -1 for channels-last activations.
    """

    owner: str
    method: str
    name: str
    kind: Kind
    index: int
    merge: str
    branches: tuple[str, ...]
    channels: int
    hidden: int
    r: float
    num_merges: int
    num_parameters: int = 0
    stage: int = 0
    is_border: bool = False
    num_spatial: int = 2
    channel_dim: Literal[1, -1] = 1

    @property
    def path(self) -> str:
        """Path of the block, as in `model.get_submodule(path)`."""
        return f"{self.owner}.{self.name}" if self.owner else self.name

    def pass_over(self, reason: str) -> PassedOver:
        """Give the place no block, for a reason."""
        return PassedOver(self.owner, self.method, self.kind, self.merge, reason, self.num_merges)

    def describe_branches(self) -> str:
        """Name the gated layers, in short where there are many: `branch1 .. branch4 (4 maps)`."""
        if len(self.branches) <= _MANY:
            return ", ".join(self.branches)
        return f"{self.branches[0]} .. {self.branches[-1]} ({len(self.branches)} maps)"


@dataclass(frozen=True)
class PassedOver:
    """A merge (or a layer that was asked for) that receives no block, and the reason."""

    owner: str
    method: str
    kind: str
    merge: str
    reason: str
    num_merges: int


@dataclass(frozen=True)
class Plan:
    """All sites, and every merge that was passed over.

    Attributes:
        model: Name of the network's class.
        sites: The merges that receive a block.
        passed_over: The others.
        divisor: Hidden channels are a multiple of this.
        bias: Whether the blocks' layers have biases.
        squeeze: What a block squeezes a map to: its mean or its maximum.
        gate: The activation of a block's gate.
        block: "se", the name of another channel attention of timm's, or of a factory of the user's.
        placement: Where the block stands at a merge.
        concat: Whether the branches of a merge are squeezed jointly, or have a block each.
        at: The kinds of places that were asked for.
        note: What the user should know of how the places were chosen.
        calls: What each owner with a site was called with, in plain values, for the replay; under ":forward" what the
            network itself was.
    """

    model: str
    sites: tuple[Site, ...]
    passed_over: tuple[PassedOver, ...] = ()
    divisor: int = 8
    bias: bool = True
    squeeze: Squeeze = "mean"
    gate: Gate = "sigmoid"
    block: str = SE
    placement: Placement = "standard"
    concat: Joining = "joint"
    at: tuple[Kind, ...] = ("residual", "concat")
    note: str = ""
    calls: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all blocks."""
        return sum(site.num_parameters for site in self.sites)

    @property
    def num_folded(self) -> int:
        """How many blocks are gone, because the weights carry their gates."""
        return sum(item.reason == FOLDED for item in self.passed_over)

    @property
    def is_folded(self) -> bool:
        """Whether all blocks are gone in this way."""
        return not self.sites and self.num_folded > 0

    @property
    def placing(self) -> Placing:
        """How the places at merges were chosen."""
        return Placing(self.placement, self.concat, self.at)

    def leave_out(self, reasons: Mapping[str, str]) -> Plan:
        """Pass over some sites, by the paths of their blocks, for the reasons that are given."""
        rest = tuple(site for site in self.sites if site.path not in reasons)
        gone = tuple(site.pass_over(reasons[site.path]) for site in self.sites if site.path in reasons)
        return replace(self, sites=rest, passed_over=(*self.passed_over, *gone))

    def iterate_entries(self) -> Iterator[tuple[Entry, list[Site]]]:
        """Go through the owners' methods, each with its sites."""
        entries: dict[Entry, list[Site]] = {}
        for site in self.sites:
            entries.setdefault(Entry(site.owner, site.method), []).append(site)
        yield from entries.items()

    def to_settings(self) -> dict[str, Any]:
        """Turn what the blocks were asked to be into plain values."""
        names = ("divisor", "bias", "squeeze", "gate", "block", "placement", "concat")
        return {**{name: getattr(self, name) for name in names}, "at": list(self.at)}

    def to_json(self) -> str:
        """Write the plan as JSON; `Plan.from_json` reads it."""
        return json.dumps({"version": PLAN_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises:
            PlanError: The text is no plan, or one of a newer version.
        """
        try:
            values = json.loads(text)
            is_newer = _check_version(version := values.pop("version"))
            if not is_newer:
                sites = tuple(_read(Site, site) for site in values.pop("sites"))
                passed = tuple(_read(PassedOver, item) for item in values.pop("passed_over"))
                plan: Plan = _read(cls, {**values, "sites": sites, "passed_over": passed})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(f"not a plan of se-inject: {error!r:.300}; write one with plan.to_json()") from error
        if is_newer:
            raise PlanError(f"the plan has version {version}, this se-inject reads up to {PLAN_VERSION}: upgrade it")
        return plan

    def __str__(self) -> str:
        """Show the plan as text, one line a site."""
        lines = [f"{self.model}: {len(self.sites)} blocks, {self.num_parameters:,} parameters"]
        lines += [f"  {self.note}"] if self.note else []
        for site in self.sites:
            shape = f"{site.channels} -> {site.hidden} -> {site.channels}" if site.hidden else f"{site.channels}"
            gated = f" gating {site.describe_branches()}" if site.branches else ""
            lines.append(f"  {site.path}: {site.kind} `{site.merge}`{gated} ({shape})")
        for (kind, reason), num in self.count_reasons().items():
            lines.append(f"  passed over {num} {kind}: {reason}")
        return "\n".join(lines)

    def count_reasons(self) -> Counter[tuple[str, str]]:
        """Count the merges that were passed over, by kind and reason."""
        counts: Counter[tuple[str, str]] = Counter()
        for item in self.passed_over:
            counts[item.kind, item.reason] += item.num_merges
        return counts


def _check_version(version: object) -> bool:
    """Tell whether a version is newer than ours."""
    if type(version) is not int or version < 1:
        raise ValueError(f"version is {version!r:.80}")
    return version > PLAN_VERSION


def _read(cls: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    read = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in read.items():
        if not _is_of(value, hints[key]):
            raise ValueError(f"{cls.__name__}.{key} is {value!r:.80}")
    return cls(**read)


def _is_of(value: object, kind: Any) -> bool:
    """Tell whether a value of a file is of the type that a field declares."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if kind is str:  # some of them become comments in code, and all of them are printed
        return isinstance(value, str) and value.isprintable()
    if kind is float:
        return type(value) in (int, float)
    if kind is int:  # files of version 1 have false for an index of 0
        return isinstance(value, int)
    return isinstance(value, dict) if get_origin(kind) is Mapping else type(value) is kind
