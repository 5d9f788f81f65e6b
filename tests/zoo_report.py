"""Totals and tables of a run over the zoo: `zoo.json` for programs, `zoo.md` for people."""

import json
import os
import platform
import subprocess
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version

import torch

from se_inject.world import name_device
from tests.zoo_networks import SEED

STATUSES = ("injected", "nothing to inject", "turned away", "exception", "no CNN")
ATTENTION = "already carries channel attention"

_INTRODUCTION = """\
Every network of timm and torchvision that runs three or more convolutions on feature maps, with random weights.
`make zoo` makes this file."""
_LEGEND = """\
Merges are those of maps (4 or 5 dimensions) and, after the plus, additions of tokens, as tests/oracle.py counted them
at run time; gated and passed over are the plan's, the letters are those of the reasons above. `how` is what the
network was run on; the plan was made at its own size. Eval and train: outputs equal to the bit, in train mode with the
same seed, buffers and random state too. Gradient: in every block. Saved: written, read, and equal; `-` is not tried."""


def write_report(rows, path, *, only, jobs, seconds, num_kept=0):
    """Write rows and totals to `path` (JSON) and beside it (Markdown), or print them if there is no path."""
    rows = sorted(rows, key=lambda row: row.name)
    setting = describe_setting(rows, only, jobs, seconds)
    if num_kept:
        setting["resumed"] = f"{num_kept} rows are of an earlier run"
    totals = count_totals(rows)
    if path is None:
        print(write_markdown(setting, totals, rows))
        return
    path.write_text(
        json.dumps({"setting": setting, "totals": totals, "rows": list(map(asdict, rows))}, indent=1) + "\n"
    )
    path.with_suffix(".md").write_text(write_markdown(setting, totals, rows))


def describe_setting(rows, only, jobs, seconds):
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    return {
        "command": f"python -m tests.zoo --only {only!r} --jobs {jobs}",
        "commit": commit,
        "cpu": f"{name_device(torch.device('cpu'))}, {os.cpu_count()} cores, one thread a job",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "torchvision")},
        "seed": SEED,
        "seconds": round(seconds),
        "seconds of all networks": round(sum(row.seconds for row in rows)),
    }


def count_totals(rows):
    networks = [row for row in rows if row.status != "no CNN"]
    injected = [row for row in networks if row.status == "injected"]
    merges = sum(row.merges for row in networks)
    untraced = Counter()
    for row in networks:
        untraced.update(row.untraced)
    saved = [row.saved for row in injected if row.saved is not None]
    return {
        "names": len(rows),
        "networks": len(networks),
        **{status: sum(row.status == status for row in networks) for status in STATUSES[:-1]},
        "every merge accounted for": sum(not row.unaccounted for row in networks if not row.error.count("Error")),
        "equal in eval": sum(bool(row.equal_eval) for row in injected),
        "equal in train": sum(bool(row.equal_train) for row in injected),
        "gradient in every block": sum(bool(row.gradients) for row in injected),
        "saved and loaded": sum(saved),
        "not saved (over 150 M parameters)": len(injected) - len(saved),
        "outputs finite": sum(bool(row.finite) for row in networks),
        "with channel attention already": sum(any(ATTENTION in reason for reason in row.passed) for row in networks),
        "blocks": sum(row.sites for row in networks),
        "merges of maps": merges,
        "merges of tokens": sum(row.sequence_merges for row in networks),
        "merges gated": sum(row.gated for row in networks),
        "merges of maps not traced": sum(untraced.values()),
        "share not traced": round(sum(untraced.values()) / max(1, merges), 5),
        "not traced, by reason": dict(untraced.most_common()),
    }


def write_markdown(setting, totals, rows):
    reasons = Counter()
    for row in rows:
        reasons.update(row.passed)
    letters = {reason: _count_in_letters(i) for i, (reason, _) in enumerate(reasons.most_common())}
    parts = [
        "# The zoo",
        _INTRODUCTION,
        _write_table(("setting", ""), setting.items()),
        _write_table(("total", ""), [(key, value) for key, value in totals.items() if not isinstance(value, dict)]),
        "## Merges that were passed over, by reason",
        _write_table(("", "reason", "merges"), [(letters[key], key, num) for key, num in reasons.most_common()]),
        "## Merges of maps whose owner could not be traced",
        _write_table(("reason", "merges"), totals["not traced, by reason"].items()),
        "## Networks",
        _LEGEND,
        _write_table(
            (
                "network",
                "outcome",
                "merges",
                "gated",
                "passed over",
                "blocks",
                "eval",
                "train",
                "gradient",
                "saved",
                "how",
                "s",
            ),
            [_write_row(row, letters) for row in rows if row.status != "no CNN"],
        ),
    ]
    failed = [
        (row.name, f"{row.unaccounted[:3] or ''} {' '.join(row.error.split())[-300:]}")
        for row in rows
        if not row.holds()
    ]
    if failed:
        parts[4:4] = ["## What does not hold", _write_table(("network", "what"), failed)]
    return "\n\n".join(parts) + "\n"


def _count_in_letters(index):
    """a to z, then aa, ab and so on."""
    rest, letter = divmod(index, 26)
    return (_count_in_letters(rest - 1) if rest else "") + chr(ord("a") + letter)


def _write_row(row, letters):
    has_attention = any(ATTENTION in reason for reason in row.passed)
    outcome = row.status + (" (has channel attention)" if has_attention else "")
    merges = f"{row.merges} + {row.sequence_merges}" if row.sequence_merges else row.merges
    marks = [
        {None: "-", True: "yes", False: "NO"}[x] for x in (row.equal_eval, row.equal_train, row.gradients, row.saved)
    ]
    passed = ", ".join(f"{num} {letters[reason]}" for reason, num in row.passed.items()) or 0
    return (row.name, outcome, merges, row.gated, passed, row.sites, *marks, row.how, row.seconds)


def _write_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
