import functools
import inspect
import re
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from se_inject import inject, make_plan
from se_inject.calls import Call, Entry
from se_inject.errors import TraceError
from se_inject.tracing import trace_entry
from se_inject.twin import make_twin
from tests import nets
from tests.equality import assert_same_network


def trace(module, *args, training=False, **kwargs):
    twin = make_twin(module)
    with twin.mode:
        args = [twin.make_tensor(a, torch.float32) if isinstance(a, tuple) else a for a in args]
    return trace_entry(twin, Entry(""), Call(tuple(args), kwargs), training=training)


def targets(found):
    return [str(node.target) for node in found.graph.nodes]


def test_every_child_is_a_leaf():
    assert [n.target for n in trace(nets.wrap(nets.Residual()), (2, 3, 8, 8)).graph.nodes if n.op == "call_module"] == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]


def test_nodes_carry_values_and_work():
    node = next(n for n in trace(nets.Residual(), (2, 16, 8, 8)).graph.nodes if n.target == "conv1")
    assert tuple(node.meta["value"].shape) == (2, 16, 8, 8)
    assert node.meta["work"].convolutions == 1


def test_in_place_sums_stay_in_place():
    assert any("iadd" in target for target in targets(trace(nets.ResidualInPlace(), (2, 16, 8, 8))))


def test_what_follows_an_in_place_statement_reads_its_result():
    nodes = {n.name: n for n in trace(nets.ResidualAddStatement(), (2, 16, 8, 8)).graph.nodes}
    assert nodes["add_"] in nodes["relu_1"].all_input_nodes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_callers_mode_of_gradients_makes_no_difference(mode):
    with mode():
        assert len(make_plan(nn.Sequential(nets.conv(3, 16), nets.Residual())).sites) == 1


def test_lists_are_opened_into_one_value_a_tensor():
    twin = make_twin(nets.DenseLayer(24, 8))
    maps = [twin.make_tensor((2, 16, 8, 8), torch.float32), twin.make_tensor((2, 8, 8, 8), torch.float32)]
    found = trace_entry(twin, Entry(""), Call((maps,), {}), training=False)
    cat = next(n for n in found.graph.nodes if n.target is torch.cat)
    assert [str(n.target) for n in cat.args[0]] == ["<built-in function getitem>"] * 2


def test_the_mode_is_handed_on_and_not_baked_in():
    found = trace(nets.Dropped(), (2, 16, 8, 8))
    assert "training" in targets(found)
    assert not found.reads_mode


def test_a_branch_on_the_mode_is_noticed():
    assert trace(nets.TrainBranch(), (2, 16, 8, 8)).reads_mode


class Sized(nets.Residual):
    """Is handed a height and a width, as transformers hand them on with their tokens."""

    def forward(self, x, size, scale=1.0):
        height, width = size
        return x + self.branch(x).flatten(2).view(-1, 16, height, width) * scale


def test_numbers_that_are_handed_in_may_differ():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nets.conv(3, 16), Sized()

        def forward(self, x):
            x = self.stem(x)
            return self.block(x, (x.shape[2], x.shape[3]))

    net = Caller()
    injected = inject(net)
    for size in (8, 12):
        assert_same_network(net, injected, torch.randn(2, 3, size, size + 4))


def test_a_condition_on_a_number_that_is_handed_in_is_not_followed():
    odd = type("Odd", (nets.Residual,), {"forward": lambda self, x, n: x + self.branch(x) if n > 3 else x})
    assert "depends on the size" in trace(odd(), (2, 16, 8, 8), 8).doubt


def test_arguments_that_are_no_tensors_are_remembered():
    assert trace(nets.Optional(), (2, 16, 8, 8)).fixed == {"shortcut": None, "children": None, "scale": 1.0}


def test_types_and_numbers_of_dimensions_can_be_asked_for():
    class Asking(nets.Residual):
        def forward(self, x):
            assert isinstance(x, torch.Tensor)
            assert not isinstance(x, nn.Parameter)
            assert x.dim() == 4
            assert x.ndim == 4
            assert x.shape[1] == 16
            n, _, *rest = x.shape
            assert len(rest) == 2
            return x + self.branch(x)

    assert "add" in [n.name for n in trace(Asking(), (2, 16, 8, 8)).graph.nodes]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: x + self.branch(x) if x.sum() > 0 else x, "cannot follow its forward"),
        (lambda self, x: x + self.branch(x.numpy()), "cannot follow its forward"),
    ],
)
def test_what_cannot_be_followed_has_a_reason(forward, reason):
    kind = type("Odd", (nets.Residual,), {"forward": forward})
    with pytest.raises(TraceError, match=reason):
        trace(kind(), (2, 16, 8, 8))


@pytest.mark.parametrize(
    ("forward", "doubt"),
    [
        (
            lambda self, x: x + self.branch(x) if x.shape[2] > 4 else x,
            "its code depends on the size or type of its input",
        ),
        (lambda self, x: x + self.branch(x) if len(x) > 1 else x, "its code depends on the size or type of its input"),
        (lambda self, x: x + self.branch(x) * torch.tensor([2.0]), "it makes a constant tensor while it runs"),
        (lambda self, x: x if x.device.type == "cuda" else -x, "its code uses a text that depends on its input"),
    ],
)
def test_what_a_graph_would_not_do_leaves_a_doubt(forward, doubt):
    kind = type("Odd", (nets.Residual,), {"forward": forward})
    assert trace(kind(), (2, 16, 8, 8)).doubt == doubt
    # The source of a lambda has no room for a block.
    assert {m.reason for m in make_plan(nn.Sequential(nets.conv(3, 16), kind(), nets.Residual())).passed_over} <= {
        doubt
    }


class Changing(nets.Residual):
    """Changes the list that it is handed in the way that its subclass says."""

    def forward(self, maps):
        out = maps[0] + self.branch(maps[0])
        self.change(maps, out)
        return out


@pytest.mark.parametrize(
    "change",
    [lambda self, maps, out: maps.pop(), lambda self, maps, out: maps.append(3), lambda self, maps, out: maps.clear()],
)
def test_a_list_that_is_changed_in_an_odd_way_is_not_followed(change):
    twin = make_twin(type("Odd", (Changing,), {"change": change})())
    maps = [twin.make_tensor((2, 16, 8, 8), torch.float32)]
    assert "changes the list 'maps'" in trace_entry(twin, Entry(""), Call((maps,), {}), training=False).doubt


def test_assignments_and_additions_to_a_list_reach_the_caller():
    def change(self, maps, out):
        maps[0] = out
        maps.append(out)

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = type("Assigning", (Changing,), {"change": change})()

        def forward(self, x):
            maps = [x]
            self.block(maps)
            return maps[0] + 2 * maps[1]

    net = nn.Sequential(nets.conv(3, 16), Caller())
    injected = inject(net, include=["1.block"])
    text = inspect.getsource(type(injected[1].block))
    assert re.search(r"maps\[0\] = (\w+)\n +maps\.append\(\1\)\n +return \1\n", text)
    assert_same_network(net, injected, torch.randn(2, 3, 8, 8))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python tells where an expression stands from 3.11 on")
@pytest.mark.parametrize("read", [False, True])
def test_a_list_that_a_child_changed_is_read_as_it_stands(read):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = type("Odd", (Changing,), {"change": lambda s, m, out: m.append(out)})()
            self.rest, self.read = nets.Residual(), read

        def forward(self, x):
            maps = [x]
            out = self.block(maps)
            return self.rest.branch(out) + (maps[1] if self.read else out)

    net = nn.Sequential(nets.conv(3, 16), Caller())
    injected = inject(net)
    assert ("maps = [x]" in inspect.getsource(type(injected[1]))) is read
    assert_same_network(net, injected, torch.randn(2, 3, 8, 8))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class _CallsFunction(nets.Residual):
    def forward(self, x):
        return x + _Double.apply(self.branch(x))


def test_code_that_calls_an_autograd_function_is_refused():
    before = torch.autograd.Function.apply
    with pytest.raises(TraceError, match="its code calls the autograd function _Double"):
        trace(_CallsFunction(), (2, 16, 8, 8))
    assert torch.autograd.Function.apply == before
    assert _Double.apply(torch.ones(1)) == 2


def _double(x):
    return 2 * x


@functools.cache
def _script():
    with pytest.warns(FutureWarning, match="deprecated"):
        return torch.jit.script(_double)


class _Calls(nets.Residual):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        if not isinstance(x, torch.Tensor) or not torch.is_tensor(x):
            raise TypeError(type(x))
        return x + self.function(self.branch, x) if isinstance(x, (torch.Tensor, list)) else x


CALLS = {
    "TorchScript": (lambda branch, x: branch(_script()(x)), "Expected a value of type 'Tensor"),
    "vmap": (lambda branch, x: branch(torch.func.vmap(_double)(x)), "_add_batch_dim"),
    "fork": (lambda branch, x: torch.jit.wait(torch.jit.fork(branch, x)), "cannot infer type"),
    "a checkpoint": (lambda branch, x: checkpoint(branch, x, use_reentrant=False), "it checkpoints activations; turn"),
    "a reentrant one": (lambda branch, x: checkpoint(branch, x, use_reentrant=True), "function CheckpointFunction"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.fork` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CALLS)
def test_code_in_c_does_not_take_a_proxy_for_a_tensor(name):
    """It asks with `isinstance`, as code in Python does, and read the memory of whatever said yes."""
    _script()
    function, message = CALLS[name]
    with pytest.raises(TraceError, match=re.escape(message)):
        trace(_Calls(function), (2, 16, 8, 8))
    assert any("add" in target for target in targets(trace(_Calls(lambda branch, x: branch(x)), (2, 16, 8, 8))))


def test_items_of_a_tensor_may_be_assigned():
    class Assigning(nets.Residual):
        def forward(self, x):
            out = self.branch(x)
            out[:, :4] = out[:, :4] * 2
            out[:, :, 1:] += 1
            return x + out

    net = nn.Sequential(nets.conv(3, 16), Assigning())
    injected = inject(net)
    assert_same_network(net, injected, torch.randn(2, 3, 8, 8))
    nn.init.ones_(injected[1].se.fc2.weight)
    nn.init.ones_(injected[1].se.fc1.weight)
    assert not torch.equal(net(torch.ones(2, 3, 8, 8)), injected(torch.ones(2, 3, 8, 8)))
