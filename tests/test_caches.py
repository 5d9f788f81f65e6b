"""What a network's code keeps in its classes and files is as it was after planning, and holds no fake tensor."""

import functools
import inspect
import sys
import types
from collections import OrderedDict, deque
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from se_inject import blocks, inject, make_plan, optimize
from se_inject.caches import kept_caches
from se_inject.calls import Call
from se_inject.costs import compare_costs
from se_inject.probe import probe_model
from se_inject.programs import Freedom, make_program
from se_inject.rewrite import get_plan
from tests import nets
from tests.equality import assert_equal_outputs, assert_same_network

X = (2, 3, 16, 16)
SPLICED = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python tells where an expression stands from 3.11 on")


def draw_line(width):
    return torch.linspace(-1, 1, width)


class Store:
    def __init__(self):
        self.lines = {}


LINES = {}
NESTED = {"lines": {}}
STORE = Store()
WEAK = WeakKeyDictionary()
LINE = None


@functools.lru_cache
def cached_line(width):
    return draw_line(width)


def default_line(width, lines={}):  # noqa: B006  that is what is tested
    if width not in lines:
        lines[width] = draw_line(width)
    return lines[width]


def memoized(function):
    lines = {}

    def run(width):
        if width not in lines:
            lines[width] = function(width)
        return lines[width]

    return run


memoized_line = memoized(draw_line)


class Lined(nets.Residual):
    """A residual block that adds a line of coordinates, which it has from somewhere."""

    def forward(self, x):
        return x + self.branch(x) * self.get_line(x.shape[3])


class OfClass(Lined):
    lines = {}  # noqa: RUF012

    def get_line(self, width):
        if width not in self.lines:
            self.lines[width] = draw_line(width)
        return self.lines[width]


class OfClassAttribute(Lined):
    line = None

    def get_line(self, width):
        if self.line is None:
            type(self).line = draw_line(width)
        return self.line


class OfFile(Lined):
    def get_line(self, width):
        if width not in LINES:
            LINES[width] = draw_line(width)
        return LINES[width]


class OfNestedDict(Lined):
    def get_line(self, width):
        if width not in NESTED["lines"]:
            NESTED["lines"][width] = draw_line(width)
        return NESTED["lines"][width]


class OfStore(Lined):
    def get_line(self, width):
        if width not in STORE.lines:
            STORE.lines[width] = draw_line(width)
        return STORE.lines[width]


class OfGlobal(Lined):
    def get_line(self, width):
        global LINE  # noqa: PLW0603
        if LINE is None:
            LINE = draw_line(width)
        return LINE


class OfFunction(Lined):
    def get_line(self, width):
        return cached_line(width)


class OfMethod(Lined):
    @functools.lru_cache  # noqa: B019  that is what is tested
    def draw(self, width):
        return draw_line(width)

    def get_line(self, width):
        return self.draw(width)


class OfDefault(Lined):
    def get_line(self, width):
        return default_line(width)


class OfClosure(Lined):
    def get_line(self, width):
        return memoized_line(width)


class OfWeakKeys(Lined):
    def get_line(self, width):
        if self not in WEAK:
            WEAK[self] = draw_line(width)
        return WEAK[self]


class OfSharedAttribute(Lined):
    """A copy has a copy of it."""

    def __init__(self):
        super().__init__()
        self.store = STORE

    def get_line(self, width):
        if width not in self.store.lines:
            self.store.lines[width] = draw_line(width)
        return self.store.lines[width]


KINDS = [
    *(OfClass, OfClassAttribute, OfFile, OfNestedDict, OfStore, OfGlobal, OfFunction, OfMethod, OfDefault, OfClosure),
    *(OfWeakKeys, OfSharedAttribute),
]


def forget():
    global LINE  # noqa: PLW0603
    LINE = OfClassAttribute.line = None
    closure = next(cell.cell_contents for cell in memoized_line.__closure__ if type(cell.cell_contents) is dict)
    for container in (OfClass.lines, LINES, NESTED["lines"], STORE.lines, default_line.__defaults__[0], closure, WEAK):
        container.clear()
    cached_line.cache_clear()
    OfMethod.draw.cache_clear()


@pytest.fixture(autouse=True)
def forgotten():
    forget()
    yield
    forget()


def make_network(kind):
    return nn.Sequential(nets.conv(3, 16), kind(), nets.Residual()).eval()


@pytest.mark.parametrize("is_used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_fake_tensor_stays_where_the_original_finds_it(kind, is_used):
    net, x = make_network(kind), torch.randn(X)
    with torch.no_grad():
        before = net(x) if is_used else None
        plan = make_plan(net, example=torch.zeros(X))
        outputs = net(x)
        assert type(outputs) is torch.Tensor
        assert before is None or torch.equal(outputs, before)
        forget()
        injected = inject(net, plan=plan)
        fast = optimize(injected)
        compare_costs(injected, get_plan(injected))
        assert torch.equal(injected(x), outputs)
        assert torch.equal(net(x), outputs)
        torch.testing.assert_close(fast(x), outputs)
    assert blocks(injected)
    assert_same_network(net, injected, x)


@SPLICED
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_whose_code_keeps_something_gets_its_block(kind):
    net = make_network(kind)
    injected = inject(net, example=torch.zeros(X))
    assert list(blocks(injected)) == ["1.se", "2.se"]
    written = inspect.getsource(type(injected[1]).forward)
    net(torch.randn(X))  # what it keeps makes no other code
    for again in (inject(net, example=torch.zeros(X)), inject(net, plan=get_plan(injected))):
        assert inspect.getsource(type(again[1]).forward) == written


def test_programs_leave_no_fake_tensor():
    net, x = make_network(OfClass), torch.randn(X)
    make_program(net, Call((x,), {}), ".pt2", Freedom(batch=False))
    assert not any(isinstance(line, FakeTensor) for line in OfClass.lines.values())


def test_what_a_child_keeps_is_no_doubt_about_its_owner():
    class Owner(nets.Residual):
        def __init__(self):
            super().__init__()
            self.child = OfClass()

        def forward(self, x):
            return x + self.branch(self.child(x))

    net = nn.Sequential(nets.conv(3, 16), Owner())
    injected = inject(net, example=torch.zeros(X))
    assert "1.se" in blocks(injected)
    assert_same_network(net, injected, torch.randn(X))


KEPT = object()


class Keeper(nn.Module):
    """Changes all that can be changed."""

    numbers = [1, 2]  # noqa: RUF012
    names = OrderedDict(a=1, b=2)  # noqa: RUF012
    queue = deque([1, 2, 3], maxlen=3)  # noqa: RUF012
    chosen = {1, 2}  # noqa: RUF012
    removed = 1
    value = KEPT

    def __init__(self):
        super().__init__()
        self.conv = nets.conv(3, 8)

    def forward(self, x):
        self.numbers.append(x)
        self.names.move_to_end("a")
        self.names["b"] = x
        self.queue.append(x)
        self.chosen.discard(1)
        self.chosen.add("x")
        if "removed" in vars(Keeper):
            del Keeper.removed
        Keeper.value, Keeper.added = x, x
        return self.conv(x)


def test_everything_is_as_it_was():
    before = dict(vars(Keeper))
    probe_model(Keeper(), example=torch.zeros(X))
    assert vars(Keeper) == before
    assert Keeper.value is KEPT
    assert Keeper.numbers == [1, 2]
    assert list(Keeper.names.items()) == [("a", 1), ("b", 2)]
    assert Keeper.queue == deque([1, 2, 3])
    assert Keeper.queue.maxlen == 3
    assert Keeper.chosen == {1, 2}


def test_a_cache_that_was_not_added_to_is_not_emptied():
    line = cached_line(16)
    with kept_caches(make_network(OfFunction)):
        cached_line(16)
    assert cached_line(16) is line
    with kept_caches(make_network(OfFunction)):
        cached_line(17)
    assert cached_line.cache_info().currsize == 0


class Touchy:
    """An object that does not want to be looked at."""

    __slots__ = ("__dict__", "other")

    def __eq__(self, other):
        raise AssertionError("compared")

    def __hash__(self):
        raise AssertionError("hashed")

    def __bool__(self):
        raise AssertionError("asked")

    def __getattribute__(self, name):
        raise AssertionError("read")


class TouchyMeta(type):
    def __eq__(cls, other):
        raise AssertionError("compared")

    def __hash__(cls):
        raise AssertionError("hashed")

    def __setattr__(cls, name, value):
        raise AssertionError("written")


class TouchyClass(metaclass=TouchyMeta):
    lines = {}  # noqa: RUF012


class TouchyDict(dict):
    def items(self):
        raise AssertionError("read")

    __setitem__ = __delitem__ = __iter__ = clear = copy = update = items


TOUCHY = {"object": Touchy(), "class": TouchyClass, "instance": TouchyClass(), "dict": TouchyDict(a=1)}


class Odd(nn.Module):
    touchy = Touchy()

    def __init__(self):
        super().__init__()
        self.conv = nets.conv(3, 8)

    @property
    def line(self):
        raise AssertionError("asked for")

    def forward(self, x):
        dict.__setitem__(TOUCHY["dict"], "a", x)
        type.__setattr__(TouchyClass, "line", x)
        TouchyClass.lines[0] = x
        return self.conv(x)


def test_odd_objects_are_put_back_without_a_word():
    probe_model(Odd(), example=torch.zeros(X))
    assert dict.__getitem__(TOUCHY["dict"], "a") == 1
    assert TouchyClass.lines == {}
    assert "line" not in vars(TouchyClass)


def test_what_was_imported_meanwhile_stays(monkeypatch):
    file = types.ModuleType("imported_meanwhile")
    net = make_network(OfFile)
    with kept_caches(net):
        monkeypatch.setitem(globals(), "imported", file)
        monkeypatch.setitem(globals(), "LINES", {})
    assert globals()["imported"] is file
    assert LINES is globals()["LINES"]


def test_what_is_not_of_a_twin_stays():
    class Slotted:
        __slots__ = ("x",)

    slotted = Slotted()
    with kept_caches(make_network(OfClass)):
        OfClass.lines["another thread's"] = slotted
    assert OfClass.lines.pop("another thread's") is slotted


def test_a_run_that_fails_leaves_nothing():
    class Failing(OfClass):
        def forward(self, x):
            return super().forward(x).no_such_method()

    with pytest.raises(ValueError, match="does not run"):
        make_plan(make_network(Failing), example=torch.zeros(X))
    assert OfClass.lines == {}


@SPLICED
def test_code_that_was_written_keeps_nothing_fake_either():
    net = nn.Sequential(nets.conv(3, 16), Written(), nets.Residual()).eval()
    injected = inject(net, example=torch.zeros(X))
    assert "1.se" in blocks(injected)
    optimize(injected)
    with torch.no_grad():
        assert_equal_outputs(injected(torch.ones(X)), net(torch.ones(X)))


WRITTEN = None


class Written(nets.Residual):
    def forward(self, x):
        global WRITTEN  # noqa: PLW0603
        if WRITTEN is None:
            WRITTEN = draw_line(16)
        return x + self.branch(x) * WRITTEN
