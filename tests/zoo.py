"""Every convolutional network of timm and torchvision, without weights: what is injected, and whether all holds.

    python -m tests.zoo --only 'timm:resnet*' --jobs 2 --out benchmarks/results/zoo.json

Each network is built with random weights, run in eval and in train mode, injected in place, and run again. Merges are
counted at run time by tests/oracle.py, which knows nothing of the tracer. Rows are written to FILE.jsonl as they come;
`--resume` keeps the rows that are there. At the end FILE.json and FILE.md hold rows and totals.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from se_inject import blocks, inject, load, make_plan, save
from se_inject.errors import EmptyPlanError, ExampleError, SEInjectError
from se_inject.rewrite import get_plan
from tests.equality import tensors_of
from tests.oracle import MergeOracle
from tests.zoo_networks import SEED, CheapInit, build, enliven, list_networks, make_source, propose_inputs

MIN_CONVOLUTIONS = 3
MAX_SAVED = 150_000_000
MAX_AT_ONCE = 300_000_000


@dataclass
class Row:
    """What became of a network.

    Attributes:
        name: With its library.
        status: injected, nothing to inject, no CNN, turned away (an error that the library expects) or exception.
        how: What it was run on.
        parameters: How many it has.
        convolutions: How many convolutions of maps ran.
        merges: Merges of maps (4 or 5 dimensions) that ran, by the oracle.
        sequence_merges: Additions of tokens (3 dimensions) that ran, by the oracle.
        num_planned: Merges that the plan has an answer for.
        unaccounted: Modules whose merges are not those that the plan has an answer for: (path, oracle, plan).
        sites: How many blocks there are.
        gated: Merges before which a block stands.
        passed: Merges that were passed over, by reason.
        untraced: Those of them that are of maps and whose owner could not be traced.
        equal_eval: Outputs are the same to the bit.
        equal_train: Outputs, buffers and random state are the same to the bit.
        gradients: A gradient reaches every block.
        saved: The file that was written and read gives the same outputs; None if there was no attempt.
        finite: All outputs are finite numbers.
        seconds: From building to the last check.
        error: What went wrong.
    """

    name: str
    status: str = "exception"
    how: str = ""
    parameters: int = 0
    convolutions: int = 0
    merges: int = 0
    sequence_merges: int = 0
    num_planned: int = 0
    unaccounted: list = field(default_factory=list)
    sites: int = 0
    gated: int = 0
    passed: dict = field(default_factory=dict)
    untraced: dict = field(default_factory=dict)
    equal_eval: bool | None = None
    equal_train: bool | None = None
    gradients: bool | None = None
    saved: bool | None = None
    finite: bool | None = None
    seconds: float = 0.0
    error: str = ""

    def holds(self):
        """Tell whether the network meets every mark that one network can meet."""
        if self.status == "no CNN":
            return True
        checks = [self.equal_eval, self.equal_train, self.gradients, self.saved is not False]
        fine = self.status == "nothing to inject" or (self.status == "injected" and all(checks))
        return fine and not self.unaccounted


@dataclass
class Before:
    """What the original network did."""

    inputs: object
    oracle: MergeOracle
    training: MergeOracle
    eval_output: list
    train_output: list
    buffers: dict
    state: torch.Tensor


def examine(name, lock=None):
    """Put one network through everything; nothing is raised. Networks that are too large wait for `lock`."""
    row = Row(name)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(row, lock or contextlib.nullcontext())
    except SEInjectError as error:
        row.status, row.error = "turned away", f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  the row says what it was
        row.status, row.error = "exception", traceback.format_exc()[-2000:]
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _examine(row, lock):
    init = CheapInit()
    model = build(row.name, init)
    row.parameters = sum(p.numel() for p in model.parameters())
    layers = sum(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    if layers < MIN_CONVOLUTIONS:
        row.status = "no CNN"
        return
    if row.parameters > MAX_AT_ONCE and (passed_over := _find_nothing(model)):
        before = _count_over_fakes(row, model)
        row.status = "nothing to inject" if before.oracle.convolutions >= MIN_CONVOLUTIONS else "no CNN"
        _account(row, before, [], passed_over)
        return
    with lock if row.parameters > MAX_AT_ONCE else contextlib.nullcontext():
        init.draw()
        enliven(model).requires_grad_(False)
        before = _run_original(row, model)
        if before is None:
            row.status = "no CNN"
            return
        try:
            _inject(row, model, before)
        except EmptyPlanError as error:
            row.status = "nothing to inject"
            _account(row, before, [], error.passed_over)
            return
        _account(row, before, get_plan(model).sites, get_plan(model).passed_over)
        _compare(row, model, before)


def _find_nothing(model):
    """Find what is passed over, if there is nothing to inject: then merges are counted, and no outputs compared."""
    try:
        make_plan(model)
    except EmptyPlanError as error:
        return error.passed_over
    except ExampleError:
        pass
    return ()


def _count_over_fakes(row, model):
    """Count the merges of a large network over tensors without numbers, which takes neither memory nor time."""
    inputs = list(propose_inputs(row.name, model))[-1]
    oracle = MergeOracle()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), oracle.watch(model):
        model.eval()(*map(mode.from_tensor, inputs.args))
    row.how, row.convolutions = f"{inputs.how}, counted over fake tensors", oracle.convolutions
    row.merges, row.sequence_merges = sum(oracle.maps.values()), sum(oracle.sequences.values())
    return Before(inputs, oracle, MergeOracle(), [], [], {}, torch.empty(0))


def _run_original(row, model):
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    errors = []
    for inputs in propose_inputs(row.name, model):
        oracle, training = MergeOracle(), MergeOracle()
        try:
            with training.watch(model):
                train_output = [x.detach() for x in tensors_of(_train(model, inputs))]
            state = torch.get_rng_state()
            after = {key: value.clone() for key, value in model.named_buffers()}
            _restore(model, buffers)
            # Last, so that what a network keeps of a run (caches) is what evaluation leaves behind, as for a user.
            with torch.no_grad(), oracle.watch(model):
                output = tensors_of(model.eval()(*inputs.args))
        except Exception as error:  # noqa: BLE001  a network may not run on the small sizes that are tried first
            errors.append(f"{inputs.how}: {str(error)[:300]}")
            _restore(model, buffers)
            continue
        break
    else:
        raise RuntimeError(f"it runs on none of the inputs: {errors}")
    if oracle.convolutions < MIN_CONVOLUTIONS:
        return None
    row.how, row.convolutions = inputs.how, oracle.convolutions
    row.merges, row.sequence_merges = sum(oracle.maps.values()), sum(oracle.sequences.values())
    row.finite = all(bool(x.isfinite().all()) for x in (*output, *train_output))
    return Before(inputs, oracle, training, output, train_output, after, state)


def _restore(model, buffers):
    for key, value in model.named_buffers():
        value.copy_(buffers[key])


def _train(model, inputs, seed=SEED):
    torch.manual_seed(seed)
    return model.train()(*inputs.training)


def _inject(row, model, before):
    try:
        inject(model, inplace=True)
    except ExampleError:
        inject(model, inplace=True, example=before.inputs.args)
        row.how += ", given as example"
    row.status = "injected"


def _account(row, before, sites, passed_over):
    """Hold the plan against what the oracle counted, module by module."""
    planned = Counter()
    reasons, untraced = Counter(), Counter()
    for item in (*sites, *passed_over):
        planned[item.owner] += item.num_merges
    rest = before.oracle.maps.copy()
    for site in sites:
        rest[site.owner] -= site.num_merges if site.num_spatial > 1 else 0
    for item in passed_over:
        reasons[item.reason] += item.num_merges
        if not item.merge:  # only what was not traced has no code to show
            num = min(item.num_merges, max(0, rest[item.owner]))
            untraced[item.reason] += num
            rest[item.owner] -= num
    row.sites, row.gated = len(sites), sum(site.num_merges for site in sites)
    row.passed, row.untraced, row.num_planned = dict(reasons), dict(+untraced), sum(planned.values())
    for path in sorted({*planned, *before.oracle.maps, *before.oracle.sequences, *before.training.maps}):
        seen = before.oracle if before.oracle.maps[path] + before.oracle.sequences[path] else before.training
        least = seen.maps[path] + seen.sequences[path]
        if not least <= planned[path] <= least + seen.unclear[path]:
            row.unaccounted.append((path, least, planned[path]))


def _compare(row, model, before):
    added = blocks(model)
    with torch.no_grad():
        output = model.eval()(*before.inputs.args)
    row.equal_eval = _are_equal(before.eval_output, tensors_of(output))
    if row.parameters <= MAX_SAVED:
        row.saved = _save_and_load(row, model, before)
    output = _train(model, before.inputs)
    same_state = torch.equal(torch.get_rng_state(), before.state)
    buffers = {key: value for key, value in model.named_buffers() if key in before.buffers}
    same_buffers = _are_equal(list(before.buffers.values()), list(buffers.values()))
    row.equal_train = _are_equal(before.train_output, tensors_of(output)) and same_state and same_buffers
    dead = _find_dead(added, output)
    for seed in range(1, 5):  # stochastic depth drops a branch for all images of a small batch now and then
        dead = dead and _find_dead(dead, _train(model, before.inputs, seed))
    row.gradients = not dead
    row.error = f"no gradient in {', '.join([*dead][:5])}" if dead else ""


def _find_dead(added, output):
    """Find the blocks that no gradient reaches."""
    losses = [(x * torch.rand(x.shape)).sum() for x in tensors_of(output) if x.requires_grad]
    weights = [block.fc2.weight for block in added.values()]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), weights, allow_unused=True)
    return {path: b for (path, b), g in zip(added.items(), gradients, strict=True) if g is None or not g.any()}


def _save_and_load(row, model, before):
    with tempfile.TemporaryDirectory() as folder, CheapInit().patch():
        save(model, Path(folder) / "model.pt", source=make_source(row.name))
        # Whether a parameter wants a gradient decides which of torch's kernels runs.
        loaded = load(Path(folder) / "model.pt").requires_grad_(False)
    with torch.no_grad():
        return _are_equal(before.eval_output, tensors_of(loaded(*before.inputs.args)))


def _are_equal(left, right):
    return len(left) == len(right) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def main():
    from tests.zoo_pool import run
    from tests.zoo_report import write_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of names, as in 'timm:resnet*'")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where rows and totals go; by default they are printed")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in FILE.jsonl")
    options = parser.parse_args()
    lines = options.out.with_suffix(".jsonl") if options.out else Path(os.devnull)
    if options.resume and not options.out:
        parser.error("--resume goes on with the rows of --out FILE")
    rows = [Row(**json.loads(line)) for line in lines.read_text().splitlines()] if options.resume else []
    done = {row.name for row in rows}
    names = [n for n in list_networks() if fnmatch.fnmatch(n, options.only) and n not in done]
    start = time.perf_counter()
    # A network that kills its process, or takes too long, is a row with an error.
    with lines.open("a" if options.resume else "w") as file:
        for row in run(names, options.jobs):
            rows.append(row)
            print(json.dumps(asdict(row)), file=file, flush=True)
            mark = "" if row.holds() else f"  !! {row.unaccounted[:2]} {row.error.strip().splitlines()[-1:]}"
            print(f"{len(rows):5} {row.seconds:6.1f} s  {row.status:18} {row.name}{mark}", flush=True)
    seconds = time.perf_counter() - start
    write_report(rows, options.out, only=options.only, jobs=options.jobs, seconds=seconds, num_kept=len(done))


if __name__ == "__main__":
    main()
