"""What the runs of `benchmarks.accuracy` show: means, spreads, and paired differences with their intervals.

Takes finished rows, gives a summary of plain values and a Markdown table. Runs nothing.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from se_inject.comparison import compute_half_width

SE = "se"
_SHOWN = (
    "lr", "batch_size", "crop", "ema", "precision", "smoothing", "label_temperature", "gates_share", "gates_lr",
    "se_lr", "distill",
)  # fmt: skip
_COLUMNS = (
    "network", "training images", "epochs (steps)", "arm", "parameters", "before", "after", "se - arm", "other half",
    "val loss", "s",
)  # fmt: skip
ONLY_SE = ("gates_share", "gates_lr", "se_lr", "distill")
"""What the other arms do not have; `control_distill` has `distill`."""


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summarise rows by network, share and epochs.

    Returns:
        Of each budget: `arms` with mean and standard deviation of top-1 in per cent, and `differences`, `se` minus each
        other arm over the seeds that both have, in points, with Student's 95 % interval (None with one seed);
        `differences_unchosen` is over the half of the test images by which no setting was chosen.
    """
    budgets: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        budgets[row["network"], row["share"], row["epochs"]][row["arm"]][row["seed"]] = row
    return [
        {
            **dict(zip(("network", "share", "epochs"), budget, strict=True)),
            "steps": next(iter(next(iter(arms.values())).values()))["steps"],
            "arms": {arm: _describe_arm(list(by_seed.values())) for arm, by_seed in arms.items()},
            "differences": {arm: _subtract(arms[SE], arms[arm]) for arm in arms if arm != SE and SE in arms},
            "differences_unchosen": {
                arm: _subtract(arms[SE], arms[arm], "top1_unchosen") for arm in arms if arm != SE and SE in arms
            },
        }
        for budget, arms in sorted(budgets.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2]))
    ]


def count_equal_starts(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Count the starts of `se` that score exactly what the control scores before the first step.

    Returns:
        How many do, and how many there are.
    """
    starts: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        starts[row["network"], row["share"], row["epochs"], row["seed"]][row["arm"]] = row["before"]
    pairs = [(start[SE], start["control"]) for start in starts.values() if SE in start and "control" in start]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)


def _describe_arm(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    top1 = [row["top1"] for row in rows]
    means = {key: statistics.fmean(row[key] for row in rows) for key in ("before", "top1", "val_loss", "seconds")}
    rate = statistics.median(row["images_per_second"] for row in rows)
    return {
        **means,
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "num_seeds": len(top1),
        "parameters": rows[0]["parameters"],
        "images_per_second": rate,
    }


def _subtract(
    ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], key: str = "top1"
) -> dict[str, Any]:
    seeds = sorted(s for s in ours.keys() & theirs.keys() if ours[s][key] is not None)
    points = [ours[seed][key] - theirs[seed][key] for seed in seeds]
    losses = [ours[seed]["val_loss"] - theirs[seed]["val_loss"] for seed in seeds]
    if not points:
        return {"points": None, "low": None, "high": None, "val_loss": None, "num_seeds": 0}
    mean = statistics.fmean(points)
    half = compute_half_width(points) if len(points) > 1 else None
    return {
        "points": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "val_loss": statistics.fmean(losses),
        "num_seeds": len(points),
    }


def write_table(result: Mapping[str, Any]) -> str:
    """Write the summary as Markdown."""
    rows, setting = result["rows"], result["setting"]
    num_equal, num_pairs = count_equal_starts(rows)
    lines = ["# Accuracy after equal budgets", "", f"`{result['command']}`", ""]
    lines.append("; ".join(f"{key} {value}" for key, value in setting.items()) + ".")
    if result["throughput"]:
        lines += ["", *(_write_throughput(name, item) for name, item in result["throughput"].items())]
    if not rows:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        _write_settings(rows),
        "All arms of a seed see the same images in the same order. Top-1 in per cent, mean and standard deviation",
        "over seeds; `se - arm` is the paired difference in points with Student's 95 % interval over seeds, and",
        "`other half` the same on the half of the test images by which no setting was chosen. Before the first step",
        f"`se` and `control` score the same in {num_equal} of {num_pairs} pairs.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for budget in result["summary"]:
        head = f"{budget['network']} | {budget['share']:.0%} | {budget['epochs']:g} ({budget['steps']})"
        for arm, item in budget["arms"].items():
            spread = "" if item["std"] is None else f" ± {item['std']:.2f}"
            numbers = f"{item['parameters']:,} | {item['before']:.2f} | {item['top1']:.2f}{spread}"
            difference = _show_difference(budget["differences"].get(arm))
            unchosen = _show_difference(budget["differences_unchosen"].get(arm))
            cost = f"{item['val_loss']:.4f} | {item['seconds']:.0f}"
            lines.append(f"| {head} | {arm} | {numbers} | {difference} | {unchosen} | {cost} |")
    return "\n".join(lines) + "\n"


def _write_settings(rows: Sequence[Mapping[str, Any]]) -> str:
    row = next((row for row in rows if row["arm"] == SE), rows[0])
    recipe = row["recipe"]
    shared = ", ".join(f"{key} {recipe[key]}" for key in _SHOWN if key not in ONLY_SE)
    own = ", ".join(f"{key} {recipe[key]}" for key in ONLY_SE)
    images = "test images by which settings are chosen" if row["is_choosing"] else "test images"
    num = len({row["seed"] for row in rows})
    seeds = "1 seed" if num == 1 else f"{num} seeds"
    return f"{row['data']}, scored on {row['num_val']:,} {images}; {seeds}. All arms: {shared}. `se`: {own}."


def _show_difference(item: Mapping[str, Any] | None) -> str:
    if item is None or item["points"] is None:
        return ""
    if item["low"] is None:
        return f"{item['points']:+.2f}"
    return f"{item['points']:+.2f} [{item['low']:+.2f}, {item['high']:+.2f}]"


def _write_throughput(name: str, item: Mapping[str, Any]) -> str:
    return (
        f"Throughput, {name}: {item['ours']:.1f} images/s, timm's bare step {item['bare']:.1f}; ratio "
        f"{item['ratio']:.3f} (median of {len(item['ratios'])} interleaved pairs of {item['num_steps']} steps, batch "
        f"{item['batch_size']}); mark >= 0.95: {'met' if item['ratio'] >= 0.95 else 'missed'}."
    )
