"""Which plain networks become which of timm's SE networks, found and tried by program.

    python -m benchmarks.pairs

Every network of timm and every classifier of torchvision is built without storage. A pair is an SE network of timm and
a plain network with the same tensors but for the SE blocks: the same names and shapes, or the same kinds and shapes in
the same order. The options of the injection are computed from the sizes of the SE network's blocks. Then the plain
network, with random weights, is injected, trained for a few steps on noise (so that gates and batch norms move),
exported, and compared with timm's network on another image. Writes benchmarks/results/pairs.json and pairs.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
import torchvision
from torch import Tensor, nn

import se_inject
from benchmarks.setting import describe_setting
from se_inject.counterpart import drop_gates, find_gate_layers, map_keys, propose_options
from se_inject.export import export_to_timm
from se_inject.plan import Placement

_FOLDER = Path(__file__).parent / "results"
_NUM_STEPS = 4
_TRAIN_SIZE = 96


@dataclass(frozen=True)
class Pair:
    """An SE network of timm and a plain network with its skeleton."""

    network: str
    plain: str
    keys: Literal["by name", "by order"]


@dataclass(frozen=True)
class Trial:
    """What came of a pair.

    Attributes:
        pair: The networks.
        options: What the plain network was injected with.
        num_blocks: How many blocks it received.
        gates: How far the gates are from 1 after the training steps, at most.
        difference: Of the outputs, relative to the largest output.
        reason: Why the pair is none after all; empty if it is one.
    """

    pair: Pair
    options: Mapping[str, Any]
    num_blocks: int = 0
    gates: float = 0.0
    difference: float | None = None
    reason: str = ""


@dataclass
class _Skeletons:
    """Plain networks by what they are made of."""

    by_name: dict[Any, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_order: dict[Any, list[str]] = field(default_factory=lambda: defaultdict(list))


def build(name: str) -> nn.Module:
    """Build a network of timm, or of torchvision as in `torchvision:resnet50`, with random weights."""
    library, _, short = name.partition(":")
    if library != "torchvision":
        model: nn.Module = timm.create_model(name)
        return model
    options = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(short, **options)
    return network


def find_pairs() -> tuple[list[Pair], list[str]]:
    """Find the pairs among all networks of timm and torchvision, by names and shapes alone.

    Returns:
        The pairs, and the networks that cannot be built without storage, which were not looked at.
    """
    classifiers = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    skeletons = _Skeletons()
    gated = {}
    left_out = []
    for name in [*timm.list_models(), *classifiers]:
        try:
            with torch.device("meta"):
                state = build(name).state_dict()
        except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
            left_out.append(name)
            continue
        skeletons.by_name[_list_names(state)].append(name)
        skeletons.by_order[_list_kinds(state)].append(name)
        if (gates := find_gate_layers(state)) and ":" not in name:
            gated[name] = drop_gates(state, gates)
    pairs = []
    for name, skeleton in gated.items():
        same = skeletons.by_name[_list_names(skeleton)]
        pairs += [Pair(name, plain, "by name") for plain in same]
        others = skeletons.by_order[_list_kinds(skeleton)]
        pairs += [Pair(name, plain, "by order") for plain in others if plain not in same]
    return pairs, left_out


def _list_names(state: Mapping[str, Tensor]) -> frozenset[Any]:
    return frozenset((key, tuple(value.shape)) for key, value in state.items())


def _list_kinds(state: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((key.rpartition(".")[2], tuple(value.shape)) for key, value in state.items())


def try_pair(pair: Pair, seed: int) -> Trial:
    """Inject, train, export and compare; the first placement that works counts, else the reason that went furthest."""
    with torch.device("meta"):
        skeleton = build(pair.network)
    gates = find_gate_layers(skeleton.state_dict())
    proposed = propose_options(gates)
    furthest = (-1, Trial(pair, proposed))
    for placement in get_args(Placement):
        torch.manual_seed(seed)
        options = {**proposed, "placement": placement}
        stage = 0
        try:
            network = build(pair.plain)
            sites = se_inject.make_plan(network, placement=placement).sites
            if len(sites) > len(gates) == sum(site.kind == "residual" for site in sites):
                options["at"] = ["residual"]
            if isinstance(options["r"], dict) and not set(options["r"]) <= {site.owner for site in sites}:
                options["r"] = 16  # the blocks stand elsewhere; the export says where
            model = se_inject.inject(network, **options, inplace=True)
            map_keys(model, skeleton, pair.network)
            stage = 1
            distance = train_briefly(model)
            export = export_to_timm(model, f"timm:{pair.network}")
        except se_inject.SEInjectError as error:
            furthest = max(furthest, (stage, Trial(pair, options, reason=str(error))), key=lambda item: item[0])
        else:
            return Trial(pair, options, len(se_inject.blocks(model)), distance, export.difference)
    return furthest[1]


def train_briefly(model: nn.Module) -> float:
    """Train a few steps on noise; return how far a gate is from 1 then, at most."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images = torch.randn(4, 3, _TRAIN_SIZE, _TRAIN_SIZE)
    model.train()
    for _ in range(_NUM_STEPS):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    distances: list[float] = []

    def measure(block: nn.Module, maps: tuple[Tensor, ...], _: object) -> None:
        assert isinstance(block, se_inject.SqueezeExcite)
        distances.append((block.compute_gate(*maps) - 1).abs().max().item())

    hooks = [block.register_forward_hook(measure) for block in se_inject.blocks(model).values()]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return max(distances)


def write_table(trials: Iterable[Trial], setting: Mapping[str, str]) -> str:
    """Write the pairs, and those that are none after all, as Markdown."""
    done = list(trials)
    lines = [
        "# Plain networks and timm's SE networks",
        "",
        "`python -m benchmarks.pairs`; " + ", ".join(f"{key} {value}" for key, value in setting.items()) + ".",
        f"Random weights, {_NUM_STEPS} steps of Adam on noise, then `export_to_timm` and one image of the network's",
        "own size: the difference is the largest one of the outputs, relative to the largest output, in eval mode.",
        "",
        "| SE network of timm | from | options | blocks | gates differ from 1 by | outputs differ by |",
        "|---|---|---|---|---|---|",
    ]
    for trial in done:
        if not trial.reason:
            gates, difference = f"{trial.gates:.2f}", f"{trial.difference:.1g}"
            names = f"{trial.pair.network} | {trial.pair.plain}"
            lines.append(f"| {names} | {_show(trial.options)} | {trial.num_blocks} | {gates} | {difference} |")
    lines += ["", "The same tensors, but not the same network:", "", "| SE network of timm | from | keys | why not |"]
    lines.append("|---|---|---|---|")
    for trial in done:
        if trial.reason:
            lines.append(f"| {trial.pair.network} | {trial.pair.plain} | {trial.pair.keys} | {trial.reason} |")
    return "\n".join(lines) + "\n"


def _show(options: Mapping[str, Any]) -> str:
    ratios = options["r"]
    values = {**options, "r": "by path"} if isinstance(ratios, dict) else options
    return ", ".join(f"{key}={value}" for key, value in values.items())


def main() -> None:
    """Find, try, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_FOLDER / "pairs.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", metavar="NAME", nargs="*", default=[], help="These SE networks alone.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = {**describe_setting(), "seed": str(options.seed), "threads": str(options.threads)}
    trials = []
    pairs, left_out = find_pairs()
    for pair in pairs:
        if not options.only or pair.network in options.only:
            start = time.perf_counter()
            trials.append(try_pair(pair, options.seed))
            took = f"{time.perf_counter() - start:.0f} s"
            outcome = trials[-1].reason or trials[-1].difference
            print(f"{pair.network} from {pair.plain} ({took}): {outcome}", file=sys.stderr, flush=True)
    table = write_table(trials, setting)
    result = {
        "command": "python -m benchmarks.pairs",
        "setting": setting,
        "left_out": left_out,
        "pairs": [asdict(trial) for trial in trials],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
