"""What is written in a method's place is compared with it, and code that would lose something keeps its source."""

import copy
import inspect
import json
import pickle
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_inject import blocks, inject, optimize
from se_inject.calls import Call, Entry
from se_inject.codegen import Method
from se_inject.equivalence import find_difference
from se_inject.twin import make_twin
from tests import nets
from tests.equality import assert_equal_outputs, assert_same_network
from tests.test_optimization import train_a_little

X = (2, 3, 16, 16)


class Store:
    def __init__(self):
        self.items = {}


def asks_class(self, x):
    y = self.branch(x)
    return x + (y * 2 if type(x) is torch.Tensor else y)


def matches_shape(self, x):
    y = self.branch(x)
    match x.shape:
        case (_, _, 16, 16):
            y = y * 2
    return x + y


def chooses_by_text(self, x):
    y = self.branch(x) * getattr(self, f"s{x.shape[-1]}", 1.0)
    return x + y


def finds_by_type(self, x):
    y = self.branch(x) * {torch.float32: 3.0}.get(x.dtype, 2.0)
    return x + y


def finds_by_device(self, x):
    y = self.branch(x) * {torch.device("cpu"): 3.0}.get(x.device, 2.0)
    return x + y


def tries(self, x):
    y = self.branch(x)
    try:
        y = y + self.position
    except RuntimeError:
        y = y * 2
    return x + y


def draws(self, x):
    y = self.branch(x) * self.generator.random()
    return x + y


def stores(self, x):
    y = self.branch(x)
    self.store.items["y"] = y
    return x + y


def writes_on_a_child(self, x):
    self.conv1.last = x
    y = self.branch(x)
    return x + y


def asks_layout(self, x):
    y = self.branch(x)
    return x + (y * 2 if x.is_contiguous(memory_format=torch.channels_last) else y)


def asks_autocast(self, x):
    y = self.branch(x)
    return x + (y * 2 if torch.is_autocast_enabled("cpu") else y)


def asks_inference(self, x):
    y = self.branch(x)
    return x + (y * 2 if torch.is_inference_mode_enabled() else y)


def is_plain(value):
    return type(value) is torch.Tensor


def asks_class_in_a_function(self, x):
    y = self.branch(x)
    return x + (y * 2 if is_plain(x) else y)


def asks_class_in_a_lambda(self, x):
    is_plain = lambda value: type(value) is torch.Tensor  # noqa: E731
    y = self.branch(x)
    return x + (y * 2 if is_plain(x) else y)


def reads_the_text_of_a_type(self, x):
    y = self.branch(x) * {"torch.float32": 1.0}.get(f"{x.dtype}", 2.0)
    return x + y


def reads_the_text_of_a_size(self, x):
    y = self.branch(x) * (2.0 if str(x.shape[0] % 2) == "0" else 1.0)
    return x + y


def compares_texts(self, x):
    y = self.branch(x) * (2.0 if f"{x.shape[2]}" == f"{x.shape[3]}" else 1.0)
    return x + y


def views_or_reshapes(self, x):
    y = self.branch(x)
    try:
        z = y.view(y.shape[0], -1).mean()
    except RuntimeError:
        z = y.reshape(y.shape[0], -1).mean() * 2
    y = y * z
    return x + y


CALLS = 0


def counts_in_its_file(self, x):
    global CALLS  # noqa: PLW0603
    CALLS += 1
    y = self.branch(x)
    return x + y


ATTRIBUTES = {
    chooses_by_text: {"s16": 2.0, "s8": 3.0},
    tries: {"position": nn.Parameter(torch.randn(1, 16, 16, 16))},
    draws: {"generator": np.random.default_rng(0)},
    stores: {"store": Store()},
}
FORWARDS = (
    asks_class, matches_shape, chooses_by_text, finds_by_type, finds_by_device, tries, draws, stores, writes_on_a_child,
    asks_layout, asks_autocast, asks_inference, counts_in_its_file, asks_class_in_a_function, asks_class_in_a_lambda,
    reads_the_text_of_a_type, reads_the_text_of_a_size, compares_texts, views_or_reshapes,
)  # fmt: skip


def make_net(forward):
    kind = type("Odd", (nets.Residual,), {"forward": forward, "__module__": __name__})
    odd = kind()
    for name, value in ATTRIBUTES.get(forward, {}).items():
        setattr(odd, name, copy.deepcopy(value))
    return nn.Sequential(nets.conv(3, 16), odd)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_code_that_does_more_than_its_graph_keeps_its_source(forward):
    net = make_net(forward)
    injected = inject(net, example=torch.zeros(X))
    source = inspect.getsource(type(injected[1]))
    assert "self.branch(x)" in source
    assert "self.se(" in source
    for shape in (X, (2, 3, 8, 8), (3, 3, 5, 6)):
        x = torch.randn(shape)
        for images in (x, x.to(memory_format=torch.channels_last)):
            assert_same_network(net, injected, images)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            assert_equal_outputs(net.eval()(x), injected.eval()(x))


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_such_code_keeps_its_source_when_it_is_optimized(forward):
    injected = inject(make_net(forward), example=torch.zeros(X)).eval()
    train_a_little(injected)
    fast = optimize(injected)
    for shape in (X, (2, 3, 8, 8), (3, 3, 5, 6)):
        x = torch.randn(shape)
        for images in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(fast(images), injected(images))


def test_what_the_code_keeps_elsewhere_is_kept_again():
    net = make_net(stores)
    injected = inject(net)
    injected(torch.randn(X))
    assert injected[1].store.items["y"].shape == (2, 16, 16, 16)
    assert net[1].store.items == {}
    assert not hasattr(inject(make_net(writes_on_a_child))[1].conv1, "last")


def test_what_the_code_counts_is_counted_again():
    injected = inject(make_net(counts_in_its_file))
    before = CALLS
    injected(torch.randn(X))
    assert before + 1 == CALLS


class Scaled(nets.Residual):
    def __init__(self):
        super().__init__()
        self.scale, self.p, self.slope = 0.5, 0.25, 0.1

    def forward(self, x):
        y = F.dropout(self.branch(x) * self.scale, self.p, self.training)
        return F.leaky_relu(x + y, self.slope)


def test_numbers_of_a_module_can_be_changed_afterwards():
    net = nn.Sequential(nets.conv(3, 16), Scaled())
    injected = inject(net)
    source = inspect.getsource(type(injected[1]))
    for text in ("out * self.scale", "self.p", "training=self.training", "self.slope"):
        assert text in source
    for model in (net, injected):
        model[1].scale, model[1].p, model[1].slope = 3.0, 0.75, 0.5
    assert_same_network(net, injected, torch.randn(X))


def test_conditions_on_numbers_are_those_of_the_module():
    class Thrice(Scaled):
        def forward(self, x):
            assert isinstance(self.scale, float)
            y = self.branch(x)
            if round(self.p * 4) == 1 and self.scale <= 0.5:
                y = y * 3
            return x + y

    net = nn.Sequential(nets.conv(3, 16), Thrice())
    assert_same_network(net, inject(net), torch.randn(X))


class Judged(nn.Module):
    """A module whose method is compared with methods that were written in other ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("scale", torch.ones(4, 1, 1))
        self.register_buffer("other", torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.a(x) * self.scale
        z = F.dropout(self.b(y), 0.1, self.training)
        return [x + z, y]


SAME = {
    "as it is": "y = self.a(x) * self.scale; z = F.dropout(self.b(y), 0.1, self.training); return [x + z, y]",
    "what is not used": "y = self.a(x) * self.scale; w = y + x; z = F.dropout(self.b(y), 0.1, self.training); "
    "return [x + z, y]",
    "other names": "out = self.a(x).mul(self.scale); "
    "o = F.dropout(self.b(out), 0.1, self.training); return [x + o, out]",
}
OTHER = {
    "operator": SAME["as it is"].replace("x + z", "x - z"),
    "order": SAME["as it is"].replace("x + z", "z + x"),
    "number": SAME["as it is"].replace("0.1", "0.2"),
    "mode": SAME["as it is"].replace("self.training", "False"),
    "child": SAME["as it is"].replace("self.b", "self.a"),
    "buffer": SAME["as it is"].replace("self.scale", "self.other"),
    "container": SAME["as it is"].replace("[x + z, y]", "(x + z, y)"),
    "result": SAME["as it is"].replace("[x + z, y]", "[x + z, z]"),
    "in place": SAME["as it is"].replace("x + z", "x.add_(z)"),
    "one call more": SAME["as it is"].replace("return", "self.a(x); return"),
    "size": SAME["as it is"].replace("y = self", "x = x[:, :, :8]; y = self"),
    "images": SAME["as it is"].replace("y = self", "x = x[:2]; y = self"),
    "raises": SAME["as it is"].replace("y = self", "assert x.shape[0] == 2; y = self"),
    "attribute": SAME["as it is"].replace("return", "self.last = y; return"),
    "argument": SAME["as it is"].replace("return", "x.mul_(2); return"),
}


def judge(source):
    twin = make_twin(Judged())
    call = Call((twin.make_tensor((2, 4, 8, 8), torch.float32),), {})
    method = Method(f"def forward(self, x):\n    {source}", {"F": F})
    return find_difference(twin, Entry(""), call, method), twin


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_methods_that_do_the_same_are_found_equal(source):
    difference, twin = judge(source)
    assert difference == ""
    assert not twin.model.training or not any(key.startswith("_tensor") for key in vars(twin.model))


@pytest.mark.parametrize("source", OTHER.values(), ids=OTHER)
def test_any_difference_is_found(source):
    difference, _ = judge(source)
    assert difference == "its code does something that the graph of torch.fx does not"


def test_modules_of_one_kind_are_compared_once():
    twin = make_twin(nn.Sequential(*(copy.deepcopy(nets.Residual()) for _ in range(5))))
    call = Call((twin.make_tensor((2, 16, 8, 8), torch.float32),), {})
    method = Method("def forward(self, x):\n    return F.relu(self.branch(x) + x)", {"F": F})
    assert [find_difference(twin, Entry(str(i)), call, method) for i in range(5)] == [""] * 5
    assert len(twin.differences) == 1


def halve_before_use(self, x):
    p = self.p
    self.p = p * 0.5
    return x + self.branch(x) * p


def keep_a_map_instead(self, x):
    p = self.p
    self.p = self.branch(x)
    y = self.p * p
    self.p = p
    return x + y


def set_of_a_child(self, x):
    self.bn1.momentum = self.p
    return x + self.branch(x)


def hand_on_elsewhere(self, x):
    NUMBERS["p"] = self.p
    y = self.branch(x)
    if x.shape[2] > 100:
        y = y * 2
    return x + y * NUMBERS["p"]


def guard(self, x):
    y = self.branch(x)
    if self.p > 0:
        y = y / self.p
    return x + y


def bound(self, x):
    return x + self.branch(x) * max(self.p, 0.1)


def compute(self, x):
    return x + self.branch(x) * (1 - self.p) * self.p


def use_numpy(self, x):
    return x + self.branch(x) * float(np.exp(self.p) + np.clip(self.p, 0, 1))


def make_tensors(self, x):
    return x + self.branch(x) * torch.as_tensor([self.p]) * torch.tensor(self.p)


def write_down(self, x):
    return x + self.branch(x) * len(json.dumps({"p": self.p, "q": f"{self.p:.3f}"})) * float(str(self.p))


def copy_it(self, x):
    return x + self.branch(x) * copy.deepcopy({"p": self.p})["p"] * pickle.loads(pickle.dumps(self.p))


def use_statistics(self, x):
    return x + self.branch(x) * statistics.mean([self.p, 1.0]) * type(self.p)(2)


class Decaying(nets.Residual):
    def forward_features(self, x):
        if self.training:
            self.p = self.p * 0.5
        return self.branch(x)

    def forward(self, x):
        p = self.p
        y = self.forward_features(x)
        return x + y * p


def test_a_number_that_a_method_changes_is_read_before():
    net = nn.Sequential(nets.conv(3, 16), Decaying(), nets.Residual())
    net[1].p = 0.25
    injected = inject(net)
    assert "1.se" in blocks(injected)
    assert_same_network(net, injected, torch.randn(X))
    assert net[1].p == injected[1].p == 0.125


NUMBERS = {"p": 0.0}
USES = (
    halve_before_use, keep_a_map_instead, set_of_a_child,
    hand_on_elsewhere, guard, bound, compute, use_numpy, make_tensors, write_down,
    copy_it, use_statistics,
)  # fmt: skip


@pytest.mark.parametrize("forward", USES, ids=lambda f: f.__name__)
def test_numbers_can_be_used_in_any_way(forward):
    kind = type("Odd", (nets.Residual,), {"forward": forward, "__module__": __name__})
    odd = kind()
    odd.p = 0.25
    setattr(odd, "not a name", 0.5)
    net = nn.Sequential(nets.conv(3, 16), odd, nets.Residual())
    injected = inject(net)
    assert {*blocks(injected)} == {"1.se", "2.se"}
    assert type(NUMBERS["p"]) is type(odd.bn1.momentum) is type(injected[1].p) is float
    copied = copy.deepcopy(injected)
    for model in (net, injected, copied):
        model[1].p = 0.25
    assert_same_network(net, copied, torch.randn(X))


@pytest.mark.parametrize("forward", [guard, bound, compute], ids=lambda f: f.__name__)
def test_numbers_by_which_code_goes_stay_what_they_were(forward):
    kind = type("Odd", (nets.Residual,), {"forward": forward, "__module__": __name__})
    odd = kind()
    odd.p = 0.25
    net = nn.Sequential(nets.conv(3, 16), odd)
    injected = inject(net).eval()
    x = torch.randn(X)
    before = net.eval()(x)
    injected[1].p = 0.0
    assert torch.equal(injected(x), before)
