"""Several threads: injecting at once, running networks while one injects, and one network in many threads."""

import copy
import inspect
import sys
import threading

import pytest
import torch
from torch import nn

from se_inject import blocks, inject, load, make_plan, optimize, save
from tests import nets

NETS = [
    nets.TwoBranches,
    nets.UNet,
    lambda: nets.wrap(nets.Dense()),
    lambda: nets.wrap(nets.TrainBranch()),
    lambda: nets.wrap(nets.Shuffle(), 32),
]


@pytest.fixture(autouse=True)
def _often_switched():
    """Let Python switch threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_at_once(*works):
    """Run functions in threads that start together; raise what one of them raised."""
    barrier, failures = threading.Barrier(len(works)), []

    def run(work):
        barrier.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001  it is raised again
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def read_code(model):
    """Read the code that was written: what torch.fx could not follow is not written anew, but spliced."""
    return [inspect.getsource(type(m)) for m in model.modules() if hasattr(type(m), "_se_inject_code")]


def find_patches():
    """Return what torch.fx, and we, replace for as long as a network is traced."""
    apply = vars(torch.autograd.Function)["apply"]
    return nn.Module.__call__, nn.Module.__getattr__, torch.is_grad_enabled, torch.zeros, torch.arange, apply


def enliven(model):
    generator = torch.Generator().manual_seed(1)
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight, generator=generator)
    return model


def test_injecting_in_threads_gives_what_it_gives_in_turn():
    models, patches = [make() for make in NETS], find_patches()
    expected = [(make_plan(model).to_json(), read_code(inject(model))) for model in models]
    found = [[] for _ in models]

    def work(i):
        for _ in range(3):
            found[i].append((make_plan(models[i]).to_json(), read_code(inject(models[i]))))

    run_at_once(*(lambda i=i: work(i) for i in range(len(models))))
    assert found == [[each] * 3 for each in expected]
    assert find_patches() == patches


def test_one_network_can_be_injected_by_several_threads():
    model, x, outputs = nets.TwoBranches().eval(), torch.randn(2, 3, 16, 16), []
    run_at_once(*[lambda: outputs.append(inject(model)(x))] * 4)
    assert len(outputs) == 4
    assert all(torch.equal(output, model(x)) for output in outputs)


@pytest.mark.parametrize("change", [lambda model: model, optimize])
def test_networks_run_while_another_thread_injects(change):
    served, x = change(enliven(inject(nets.TwoBranches())).eval()), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = served(x)
    patches, done, outputs = find_patches(), threading.Event(), []

    def serve():
        while not done.is_set():
            with torch.no_grad():
                outputs.append(torch.equal(served(x), expected))

    def cut():
        try:
            for make in NETS:
                model = make()
                plan = make_plan(model)
                assert inject(model, plan=plan) is not model
                optimize(model)
        finally:
            done.set()

    run_at_once(serve, cut, serve)
    assert len(outputs) > 10
    assert all(outputs)
    assert find_patches() == patches


def test_asking_for_gradients_in_another_thread_is_no_doubt_about_the_traced_code():
    model, done = nets.TwoBranches(), threading.Event()
    expected = read_code(inject(model))

    def ask():
        while not done.is_set():
            torch.is_grad_enabled()

    def cut():
        try:
            assert [read_code(inject(model)) for _ in range(5)] == [expected] * 5
        finally:
            done.set()

    run_at_once(ask, cut)


@pytest.mark.parametrize("form", ["loaded", "optimized", "kernels"])
def test_a_network_gives_the_same_in_many_threads(form, tmp_path):
    save(enliven(inject(nets.TwoBranches())), tmp_path / "net.pt")
    model = load(tmp_path / "net.pt", base=nets.TwoBranches)
    if form != "loaded":
        model = optimize(model, kernels=form == "kernels")
    inputs = [torch.randn(n, 3, size, size) for n, size in ((1, 16), (2, 12), (3, 8), (4, 20))]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def run(i):
        with torch.no_grad():
            for _ in range(20):
                assert torch.equal(model(inputs[i]), expected[i])

    run_at_once(*(lambda i=i: run(i) for i in range(4)))


def test_gradients_of_copies_in_many_threads_are_those_in_turn():
    model, x = enliven(inject(nets.wrap(nets.Residual()))).train(), torch.randn(2, 3, 16, 16)

    def compute(network):
        network(x).square().sum().backward()
        return [p.grad for p in network.parameters()]

    expected, found = compute(copy.deepcopy(model)), []
    run_at_once(*[lambda: found.append(compute(copy.deepcopy(model)))] * 4)
    assert len(found) == 4
    for gradients in found:
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
