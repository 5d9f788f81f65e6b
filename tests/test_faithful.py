"""Code that a graph would follow for one input, one draw or one mode alone is passed over with the reason."""

import copy
import inspect
import random
import sys
import types
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_inject import blocks, inject, make_plan
from se_inject.errors import EmptyPlanError, ModelError, SEInjectError
from se_inject.plan import Plan
from tests import nets
from tests.equality import assert_same_network
from tests.oracle import count_merges

Pair = namedtuple("Pair", "left right")
X = (2, 3, 16, 16)


def block(forward, **attributes):
    """A residual block with a forward of its own, in a network."""
    kind = type("Odd", (nets.Residual,), {"forward": forward, "__module__": __name__})
    odd = kind()
    for name, value in attributes.items():
        setattr(odd, name, value) if not isinstance(value, torch.Tensor) else odd.register_buffer(name, value)
    return nn.Sequential(nets.conv(3, 16), odd, nets.Residual())


def draw_torch(self, x):
    if self.training and torch.rand(1).item() < 0.5:
        return x
    return x + self.branch(x)


def draw_python(self, x):
    return x + self.branch(x) * random.uniform(0.9, 1.1)


def draw_numpy(self, x):
    return x + self.branch(x) * float(np.random.rand())


def count_calls(self, x):
    self.calls += 1
    return x + self.branch(x)


def remember(self, x):
    out = x + self.branch(x)
    self.last = out
    return out


def collect(self, x):
    self.seen.append(x)
    return x + self.branch(x)


def without_gradients(self, x):
    with torch.no_grad():
        x = self.conv1(x)
    return x + self.branch(x)


@torch.no_grad()
def decorated(self, x):
    return x + self.branch(x)


def under_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = self.branch(x)
    return x + out


def compare_mode(self, x):
    return x + self.branch(x) if self.training is True else x


def ask_child(self, x):
    return x + self.branch(x) if self.bn1.training else x


def ask_through_helper(self, x):
    return x + self.branch(x) if child_mode(self) else x


def child_mode(module):
    return module.bn1.training


def ask_type(self, x):
    return x + self.branch(x) if x.dtype == torch.float32 else x


def ask_gradient(self, x):
    return x + self.branch(x) if not x.requires_grad else x


def ask_tokens(self, x):
    tokens = x.flatten(2).transpose(1, 2)
    return x + self.branch(x) if tokens.size(1) > 16 else x


def ask_grad_mode(self, x):
    return x + self.branch(x) if torch.is_grad_enabled() else x - self.branch(x)


def return_ordered(self, x):
    return OrderedDict(out=x + self.branch(x))


def cut_batch(self, x):
    out = []
    for image in x.split(1, 0):
        out.append(image + self.branch(image))  # noqa: PERF401
    return torch.cat(out)


def go_through_images(self, x):
    out = []
    for image in x:
        out.append(image[None] + self.branch(image[None]))  # noqa: PERF401
    return torch.cat(out)


def count_parts(self, x):
    return x + self.branch(x) * len(x.split(4, 2))


def look_up_height(self, x):
    return x + self.branch(x) * (2 if x.shape[2] in {16, 24} else 3)


def freeze_child(self, x):
    self.bn1.eval()
    return x + self.branch(x)


def call_childs_forward(self, x):
    return x + self.bn1.forward(self.conv1(x))


def take_bytes(self, x):
    x = x if x.is_floating_point() else x / 255
    return x + self.branch(x)


KEPT = {
    cut_batch: "for image in x.split(1, 0)",
    go_through_images: "for image in x:",
    count_parts: "* len(x.split(4, 2))",
    look_up_height: "if x.shape[2] in {16, 24} else 3",
    freeze_child: "self.bn1.eval()",
    call_childs_forward: "self.bn1.forward(self.conv1(x))",
    take_bytes: "if x.is_floating_point() else x / 255",
    draw_torch: "torch.rand(1).item() < 0.5",
    draw_python: "* random.uniform(0.9, 1.1)",
    draw_numpy: "* float(np.random.rand())",
    count_calls: "self.calls += 1",
    remember: "self.last = out",
    collect: "self.seen.append(x)",
    without_gradients: "with torch.no_grad():",
    ask_type: "if x.dtype == torch.float32 else x",
    ask_gradient: "if not x.requires_grad else x",
    ask_tokens: "if tokens.size(1) > 16 else x",
    ask_grad_mode: "if torch.is_grad_enabled() else x - self.branch(x)",
    return_ordered: "return OrderedDict(out=",
}
REASONS = {
    decorated: "switches gradients or autocast",
    under_autocast: "switches gradients or autocast",
    compare_mode: "asks for a mode other than by a plain",
    ask_child: "asks for a mode other than by a plain",
    ask_through_helper: "asks for a mode other than by a plain",
}
SPLICED = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python tells where an expression stands from 3.11 on")


@SPLICED
@pytest.mark.parametrize("forward", KEPT, ids=lambda f: f.__name__)
def test_what_a_graph_would_leave_out_stays_in_the_source(forward):
    class Out(nets.Residual):
        def forward(self, x):
            return x["out"] + self.branch(x["out"]) if isinstance(x, dict) else x + self.branch(x)

    net = block(forward, calls=0, seen=[])
    net[2] = Out()
    injected = inject(net)
    text = inspect.getsource(type(injected[1]))
    assert KEPT[forward] in text
    assert text.count("self.se(") == 1
    random.seed(0)
    np.random.seed(0)
    states = random.getstate(), np.random.get_state()
    outputs = []
    for model in (net, injected):
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.manual_seed(0)
        x = torch.randn(X)
        outputs.append([model.train(mode)(y) for mode in (False, True) for y in (x, x[..., :8, :8], x[:1])])
    assert all(map(torch.equal, *outputs))


def one_line(self, x):
    if self.is_on: x = x + self.branch(x)  # fmt: skip  # noqa: E701
    return x


def test_a_plan_with_a_merge_on_a_line_with_its_condition_is_read_back():
    plan = make_plan(block(one_line, is_on=True))
    assert plan.sites[0].merge == "x + self.branch(x)"
    assert Plan.from_json(plan.to_json()) == plan


def test_an_alias_sees_what_an_in_place_remainder_wrote():
    def forward(self, x):
        out = alias = self.branch(x)
        out %= 1.0
        return x + alias

    net = block(forward)
    assert_same_network(net, inject(net), torch.randn(X))


def test_texts_hold_the_values():
    texts = []

    def forward(self, x):
        texts.append(f"{x.shape[2]:03} {x.shape[3]}" + str(x.dtype))
        return x + self.branch(x)

    assert [site.owner for site in make_plan(block(forward)).sites] == ["1", "2"]
    # What is written is tried under autocast and on larger images, too.
    assert set(texts) == {"224 224torch.float32", "224 224torch.bfloat16", "448 672torch.float32"}


@pytest.mark.parametrize("is_none", [True, False])
def test_a_child_that_returns_nothing_is_known(is_none):
    class Pair(nn.Module):
        def forward(self, x):
            return 2 * x, None if is_none else 3 * x

    def forward(self, x):
        x, other = self.pair(x)
        if other is not None:
            x = x + other
        return x + self.branch(x)

    net = block(forward, pair=Pair())
    assert_same_network(net, inject(net), torch.randn(X))


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_the_kind_of_container_that_a_child_returns_is_known(kind):
    class Twice(nn.Module):
        def forward(self, x):
            return {"out": 2 * x} if kind is dict else kind([x, 2 * x])

    def forward(self, x):
        found = self.twice(x)
        if isinstance(found, dict):
            x = x + found["out"]
        elif isinstance(found, (list, tuple)):
            x = x - found[-1]
        return x + self.branch(x)

    net = block(forward, twice=Twice())
    assert_same_network(net, inject(net), torch.randn(X))


def test_a_list_that_was_empty_at_the_example_is_filled():
    class Collecting(nets.Residual):
        def forward(self, x, seen):
            out = x + self.branch(x)
            seen.append(out)
            return out

    original = Collecting().eval()
    injected = inject(original, example=(torch.randn(2, 16, 8, 8), []))
    for seen in ([], [None]):
        expected, x = [*seen], torch.randn(2, 16, 8, 8)
        assert torch.equal(original(x, expected), injected(x, seen))
        assert torch.equal(seen[-1], expected[-1])
    copy.deepcopy(injected)


def test_a_class_of_the_main_program_is_returned(monkeypatch):
    monkeypatch.setattr(Pair, "__module__", "__main__")
    net = nn.Sequential(nets.conv(3, 16), nets.Residual())

    class Both(nets.Residual):
        def forward(self, x):
            return Pair(x, x + self.branch(x))

    injected = inject(net.append(Both()))
    assert "return Pair" in inspect.getsource(type(injected[2])).replace("main___", "")
    left, right = injected(x := torch.randn(X))
    assert torch.equal(right, net(x).right)
    assert torch.equal(left, net(x).left)


def test_an_array_of_the_class_may_be_read():
    def forward(self, x):
        return x + self.branch(x) * float(self.shares[0])

    net = block(forward)
    type(net[1]).shares = np.array([0.5, 0.25])
    assert_same_network(net, inject(net), torch.randn(X))


@pytest.mark.parametrize("forward", REASONS, ids=lambda f: f.__name__)
def test_what_holds_for_one_time_alone_is_passed_over(forward):
    plan = make_plan(block(forward, calls=0, seen=[]))
    assert [site.owner for site in plan.sites] == ["2"]
    assert {REASONS[forward] in item.reason for item in plan.passed_over} == {True}


@pytest.mark.parametrize("forward", [draw_torch, draw_python, draw_numpy], ids=lambda f: f.__name__)
def test_no_random_number_is_used_up(forward):
    net = block(forward)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    make_plan(net)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_buffers_may_be_used_and_changed_in_place():
    def scale(self, x):
        self.steps += 1
        return x + self.branch(x) * self.gamma.view(1, -1, 1, 1)

    def scale_only(self, x):
        return x + self.branch(x) * self.gamma.view(1, -1, 1, 1)

    net = block(scale_only, gamma=torch.rand(16))
    assert_same_network(net, inject(net), torch.randn(X))
    counted = block(scale, gamma=torch.rand(16), steps=torch.zeros(1))
    injected = inject(counted)
    assert_same_network(counted, injected, torch.randn(X))


@SPLICED
def test_a_cache_that_a_first_call_fills_is_filled_by_a_first_call():
    def cached(self, x):
        if self.grid is None:
            self.grid = torch.ones(x.shape[2:])
        return x + self.branch(x) * self.grid

    net = block(cached, grid=None)
    injected = inject(net)
    assert list(blocks(injected)) == ["1.se", "2.se"]
    assert injected[1].grid is net[1].grid is None
    assert_same_network(net, injected, torch.randn(X))
    assert torch.equal(injected[1].grid, net[1].grid)


def test_a_failed_try_leaves_no_trace():
    def attempt(self, x):
        try:
            out = self.conv1(x[:, :3])
        except RuntimeError:
            out = self.conv1(x)
        return x + self.bn2(torch.relu(out))

    net = block(attempt)
    assert_same_network(net, inject(net), torch.randn(X))


def test_attributes_that_a_tensor_lacks_are_missing():
    def probe(self, x):
        assert not hasattr(x, "tensors")
        return x + self.branch(x if getattr(x, "mask", None) is None else x.mask)

    net = block(probe)
    assert len(blocks(inject(net))) == 2


def test_layers_are_indexed_by_place_and_not_by_name():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Identity(), nn.Identity(), nets.conv(16, 16), nn.ReLU(), nets.conv(16, 16))[2:]

        def forward(self, x):
            out = x
            for layer in self.body:
                out = layer(out)
            return x + out

    net = nn.Sequential(nets.conv(3, 16), Sliced())
    assert_same_network(net, inject(net), torch.randn(X))


def test_a_sum_into_an_item_of_a_tuple_is_seen():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nets.conv(16, 16), nets.conv(16, 16)

        def forward(self, x):
            return self.a(torch.relu(self.b(x))), x

    class Item(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Two()

        def forward(self, x):
            pair = self.pair(x)
            out, _ = pair
            out += x
            return pair[0]

    net = nn.Sequential(nets.conv(3, 16), Item(), nets.Residual())
    assert_same_network(net, inject(net), torch.randn(X))


def test_named_tuples_are_returned():
    class Named(nets.Residual):
        def forward(self, x):
            return Pair(x + self.branch(x), x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nets.conv(3, 16), Named()

        def forward(self, x):
            return self.block(self.stem(x))

    net = Net()
    injected = inject(net)
    assert len(blocks(injected)) == 1
    assert type(injected.eval()(torch.randn(X))) is Pair
    assert_same_network(net, injected, torch.randn(X))


def test_a_list_of_another_length_is_refused():
    class Listed(nets.Residual):
        def forward(self, maps):
            x, _ = maps
            return x + self.branch(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nets.conv(3, 16), Listed()

        def forward(self, x):
            x = self.stem(x)
            return self.block([x, F.relu(x)])

    net = Net()
    injected = inject(net)
    assert_same_network(net, injected, torch.randn(X))
    with pytest.raises(ValueError, match="holds for a maps of 2 maps alone"):
        injected.block([torch.randn(2, 16, 4, 4)] * 3)


def test_a_method_set_on_the_instance_keeps_its_guards():
    def scaled(self, x, scale=1.0):
        return x + self.branch(x) * scale

    net = nn.Sequential(nets.conv(3, 16), nets.Residual())
    net[1].forward = types.MethodType(scaled, net[1])
    injected = inject(net)
    assert_same_network(net, injected, torch.randn(X))
    with pytest.raises(ValueError, match=r"holds for scale=1\.0 alone"):
        injected[1](torch.randn(2, 16, 4, 4), scale=2.0)


def test_a_function_as_forward_is_refused_before_it_runs():
    net = nn.Sequential(nets.conv(3, 16), nets.Residual())
    inner = net[1]
    inner.forward = lambda x: x + inner.branch(x)
    with pytest.raises(ModelError, match="1 has a function as its forward, which a copy would share"):
        inject(net)
    assert inner.bn1.num_batches_tracked == 0


def test_features_and_forward_with_merges_each_are_counted_once():
    class Both(nets.Split):
        def __init__(self):
            super().__init__()
            self.conv3, self.conv4 = nets.conv(16, 16), nets.conv(16, 16)

        def forward(self, x):
            x = self.forward_features(x)
            x = x + self.conv4(torch.relu(self.conv3(x)))
            return self.forward_head(x)

    net = Both()
    injected = inject(net)
    x = torch.randn(X)
    assert sorted(blocks(injected)) == ["se", "se2"]
    assert sum(site.num_merges for site in make_plan(net).sites) == count_merges(net, x) == 2
    assert_same_network(net, injected, x)
    assert all(b.fc2.weight.grad.any() for b in blocks(injected).values())
    before = injected.eval()(x)
    for name in ("se", "se2"):
        nn.init.normal_(blocks(injected)[name].fc2.weight)
        assert not torch.equal(injected(x), before)
        before = injected(x)


def test_a_parent_that_calls_features_leaves_them_to_the_child():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.conv = nets.Split(), nets.Residual()

        def forward(self, x):
            x = self.net.forward_features(x)
            return x + self.conv.branch(x)

    net = Parent()
    injected = inject(net)
    assert sorted(blocks(injected)) == ["net.se", "se"]
    assert_same_network(net, injected, torch.randn(X))


def test_an_in_place_activation_after_an_in_place_sum_is_followed():
    def both(self, x):
        out = self.branch(x)
        out.add_(x)
        return F.relu(out, inplace=True)

    net = block(both)
    injected = inject(net)
    assert len(blocks(injected)) == 2
    assert_same_network(net, injected, torch.randn(X))


@pytest.mark.parametrize("place", ["class", "property", "parameter", "buffer"])
def test_names_that_look_free_and_are_not_are_left(place):
    odd = nets.Residual()
    if place == "class":
        odd.__class__ = type("Odd", (nets.Residual,), {"se": None})
    elif place == "property":
        odd.__class__ = type("Odd", (nets.Residual,), {"se": property(lambda self: None)})
    elif place == "parameter":
        odd.register_parameter("se", None)
    else:
        odd.register_buffer("se", None)
    net = nn.Sequential(nets.conv(3, 16), odd)
    assert list(blocks(inject(net))) == ["1.se2"]


@pytest.mark.parametrize("key", ["__hidden", "in", "0", "a b"])
def test_names_that_cannot_be_written_stay_in_the_source(key):
    class Keyed(nets.Residual):
        def __init__(self):
            super().__init__()
            self.key, self.ways = key, nn.ModuleDict({key: nets.conv(16, 16)})

        def forward(self, x):
            return x + self.ways[self.key](torch.relu(self.conv1(x)))

    net = nn.Sequential(nets.conv(3, 16), Keyed(), nets.Residual())
    assert [site.owner for site in make_plan(net).sites] == ["1", "2"]
    assert_same_network(net, inject(net), torch.randn(X))

    class Other(Keyed):
        def forward(this, x):  # noqa: N805  has no room for a block
            return x + this.ways[this.key](torch.relu(this.conv1(x)))

    passed = make_plan(nn.Sequential(nets.conv(3, 16), Other(), nets.Residual())).passed_over
    reasons = {"__hidden": "'__hidden' of a child would be mangled in a class", "in": "of a child cannot be written as"}
    assert [reasons[key] in item.reason for item in passed] == [True] * (key in reasons)


def test_a_class_that_cannot_be_derived_from_changes_nothing():
    class Strict(nets.Residual):
        def __init_subclass__(cls, *, required, **options):
            super().__init_subclass__(**options)

    net = nn.Sequential(nets.conv(3, 16), nets.Residual(), Strict())
    with pytest.raises(ModelError, match="no class can be derived from .*Strict"):
        inject(net, inplace=True)
    assert not blocks(net)
    assert type(net[1]) is nets.Residual
    assert len(blocks(inject(net, exclude=["2"]))) == 1


def test_numbers_of_numpy_are_written_as_numbers():
    def scaled(self, x):
        return x + self.branch(x) * np.float64(0.5)

    net = block(scaled)
    assert_same_network(net, inject(net), torch.randn(X))


def test_a_parameter_called_f_does_not_hide_torchs_functions():
    class Named(nets.Residual):
        def forward(self, F):  # noqa: N803
            return F + self.bn2(self.conv2(torch.nn.functional.relu(self.conv1(F))))

    net = nn.Sequential(nets.conv(3, 16), Named())
    assert_same_network(net, inject(net), torch.randn(X))


def test_defaults_that_cannot_be_written_pass_over_their_owner_alone():
    class Typed(nets.Residual):
        def forward(self, x, dtype=torch.float32):
            return x + self.branch(x)

    plan = make_plan(nn.Sequential(nets.conv(3, 16), Typed(), nets.Residual()))
    assert [site.owner for site in plan.sites] == ["2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divisor": 2.5}, "divisor is 2.5; it must be a whole number"),
        ({"divisor": "8"}, "divisor is '8'"),
        ({"include": 5}, "include is 5; give a list"),
        ({"exclude": "layer4.*"}, r"exclude is 'layer4\.\*'; give a list of patterns, as in \['layer4\.\*'\]"),
    ],
)
def test_options_of_a_wrong_type_are_named(options, message):
    with pytest.raises(SEInjectError, match=message):
        inject(nets.TwoBranches(), **options)


def test_lazy_layers_have_to_be_made_first():
    with pytest.raises(ModelError, match="is a lazy layer without weights; run the network once first"):
        inject(nn.Sequential(nn.LazyConv2d(4, 3), nets.Residual()))


def test_keyword_arguments_can_be_the_example():
    class Keyword(nets.TwoBranches):
        def forward(self, *, image):
            return super().forward(image)

    net = Keyword().eval()
    injected = inject(net, example={"image": torch.zeros(2, 3, 16, 16)})
    x = torch.randn(X)
    assert torch.equal(net(image=x), injected(image=x))


def test_merges_in_hooks_do_no_harm():
    net = nets.TwoBranches()
    net.register_forward_pre_hook(lambda module, args: (args[0] + torch.ones_like(args[0]),))
    assert_same_network(net, inject(net), torch.randn(X))


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript wherever it is used
def test_a_scripted_child_is_a_leaf():
    child = torch.jit.script(nets.conv(3, 16))
    net = nn.Sequential(child, nets.Residual())
    injected = inject(net, example=torch.zeros(2, 3, 8, 8))
    assert list(blocks(injected)) == ["1.se"]
    assert_same_network(net, injected, torch.randn(X))


def test_nothing_to_inject_lists_why():
    with pytest.raises(EmptyPlanError, match="switches gradients"):
        make_plan(nn.Sequential(nets.conv(3, 16), block(decorated)[1]))
