"""What is promised holds for networks that nobody wrote; see `random_nets`."""

import copy
import functools
import pickle
import re

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings, strategies
from torch import nn

from se_inject import blocks, eject, inject, load, optimize, save
from se_inject.errors import EmptyPlanError
from se_inject.rewrite import get_plan
from tests import nets, random_nets
from tests.equality import assert_equal_outputs, tensors_of
from tests.oracle import count_merges

pytestmark = pytest.mark.slow

NUM_PARTS = 4
NUM_NETWORKS = 1000 // NUM_PARTS


def joins_channels(tensor, dim):
    """Random networks have multiples of four channels, and other sizes."""
    return tensor.shape[dim] % 4 == 0


def weigh(output):
    """A loss that depends on every value of the output, whatever norm made it."""
    generator = torch.Generator().manual_seed(0)
    return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors_of(output))


def train_once(model, x):
    """Run a train step up to the gradients; give the output, and the input's gradient."""
    torch.manual_seed(0)
    given = x.clone().requires_grad_()
    output = model.train()(given * 1)
    weigh(output).backward()
    return output, given.grad


def can_run_backward(model, x, *, training):
    """Tell whether torch can: a random network may write over what its own gradients need."""
    try:
        weigh(copy.deepcopy(model).train(training)(x.clone())).backward()
    except RuntimeError as error:
        if "inplace" in str(error):
            return False
        raise
    return True


def assert_the_same(original, injected, x):
    for training in (False, True):
        seen = []
        for model in (original, injected):
            torch.manual_seed(0)
            given = x.clone()
            with torch.no_grad():
                seen.append([model.train(training)(given), given])
        assert_equal_outputs(*seen)
    if can_run_backward(original, x, training=True):
        before, after = train_once(original, x), train_once(injected, x)
        assert_equal_outputs(before[0], after[0])
        assert torch.allclose(before[1], after[1], rtol=1e-3, atol=1e-4)  # gradients may be added up in another order
    buffers = dict(injected.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def assert_gradients_reach_every_block(injected, x):
    """In eval mode, where nothing is dropped. A branch that is zero gives none, nor do activations that are off."""
    alive = {}

    def note_gradient(block, taken, gradient):
        alive.setdefault(block, []).append(bool((gradient * taken).any()))

    def note(block, args, outputs):
        for taken, output in zip(args, tensors_of(outputs), strict=True):
            output.register_hook(functools.partial(note_gradient, block, taken.detach()))

    hooks = [block.register_forward_hook(note) for block in blocks(injected).values()]
    injected.zero_grad()
    weigh(injected.eval()(x.clone())).backward()
    for hook in hooks:
        hook.remove()
    for path, block in blocks(injected).items():
        assert block.fc2.weight.grad is not None, path
        assert block.fc2.weight.grad.any() or not any(alive[block]), path


def assert_it_is_still_a_module(network, injected, original, x, path):
    for block in blocks(injected).values():
        nn.init.normal_(block.fc2.weight)
    save(injected, path)
    with torch.no_grad():
        copies = [copy.deepcopy(injected), pickle.loads(pickle.dumps(injected)), load(path, base=network.build)]
        output = injected.eval()(x.clone())
        for again in copies:
            assert [type(m) for m in again.modules()] == [type(m) for m in injected.modules()]
            assert_equal_outputs(again.eval()(x.clone()), output)
        assert_close_outputs(optimize(injected, x)(x.clone()), output)
        for again in (eject(injected), eject(copies[1], inplace=True)):
            assert [type(m) for m in again.modules()] == [type(m) for m in original.modules()]
            assert list(again.state_dict()) == list(original.state_dict())
            assert_equal_outputs(again.eval()(x.clone()), original.eval()(x.clone()))


def assert_close_outputs(found, expected):
    """To float's rounding, which deep random networks make larger."""
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6


def try_to_inject(original, x, options):
    try:
        return inject(original, r=4, example=x.clone(), **options), ""
    except EmptyPlanError as error:
        return None, str(error)


OPTIONS = strategies.fixed_dictionaries(
    {},
    optional={
        "placement": strategies.sampled_from(("pre", "post", "identity", "conv3x3")),
        "concat": strategies.just("separate"),
        "at": strategies.lists(
            strategies.sampled_from(("residual", "concat", "fusion", "stage", "conv", "depthwise")),
            min_size=1,
            unique=True,
        ),
        "squeeze": strategies.just("max"),
        "gate": strategies.sampled_from(("hard_sigmoid", "tanh")),
    },
)


def check(network, options, path):
    original, x = nets.enliven(network.build()), network.make_input()
    num_merges = count_merges(original, x.clone(), joins_channels=joins_channels)
    injected, reasons = try_to_inject(original, x, options)
    if injected is None:
        if "no layer for" in reasons:  # layers alone were asked for, so that no merge is in question
            return
        assert sum(int(num) for num in re.findall(r"(\d+) x ", reasons)) == num_merges, reasons
        return
    plan = get_plan(injected)
    assert sum(item.num_merges for item in (*plan.sites, *plan.passed_over)) == num_merges, plan
    assert len(blocks(injected)) == len(plan.sites)
    assert_the_same(original, injected, x)
    other = network.make_input(batch=1, size=9)
    with torch.no_grad():
        assert_equal_outputs(original.eval()(other.clone()), injected.eval()(other.clone()))
    if can_run_backward(original, x, training=False):
        assert_gradients_reach_every_block(injected, x)
    assert_it_is_still_a_module(network, injected, original, x, path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("random") / "net.pt"


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_it_holds_for_random_networks(part, path):
    @seed(part)
    @settings(
        max_examples=NUM_NETWORKS,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(network=random_nets.networks(), options=OPTIONS)
    def run(network, options):
        check(network, options, path)

    run()
