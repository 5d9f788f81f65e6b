"""Blocks that are written into the source of a method, where a graph would do less than the code."""

import copy
import importlib.util
import inspect
import operator
import pickle
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_inject import blocks, inject, load, make_plan, save
from se_inject.errors import EmptyPlanError
from se_inject.rewrite import get_plan
from tests import nets
from tests.equality import assert_same_network
from tests.oracle import count_merges

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python tells where an expression stands from 3.11")
X = (2, 3, 16, 16)


class Sized(nets.Residual):
    """Has a condition on the size, so that a graph holds for one size alone."""

    def prepare(self, x):
        return F.relu(x) if x.shape[2] > 8 else x


class Dropped(Sized):
    def __init__(self, channels=16):
        super().__init__(channels)
        self.drop_path = nn.Dropout2d(0.5)

    def forward(self, x):
        x = self.prepare(x)
        return x + self.drop_path(self.branch(x))


class Added(Sized):
    def forward(self, x):
        out = x * 1
        out += self.branch(self.prepare(x))
        return out


class Method(Sized):
    def forward(self, x):
        return self.prepare(x).add(self.branch(x))


class Torch(Sized):
    def forward(self, x):
        return torch.add(self.branch(x), self.prepare(x))


class Looped(Sized):
    def forward(self, x):
        for _ in range(3):
            x = self.prepare(x)
            x = self.branch(x) + x
        return x


class Joined(Sized):
    def forward(self, x):
        x = self.prepare(x)
        return torch.cat([x, self.conv1(x), self.conv2(x)], dim=1)


class Listed(Sized):
    def forward(self, x):
        maps = [self.prepare(x)]
        for layer in (self.conv1, self.conv2):
            maps.append(layer(maps[-1]))
        return torch.cat(maps, 1)


class All(Sized):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Everything is computed here."""
        x = self.prepare(x)
        return torch.cat((self.conv1(x), self.conv2(x)), dim=1)


class AllListed(Sized):
    def forward(self, x):
        x = self.prepare(x)
        maps = [layer(x) for layer in (self.conv1, self.conv2)]
        return torch.cat(maps, dim=1)


class Overwritten(Sized):
    """The branch is on the left, and the sum is written over it."""

    def forward(self, x):
        x = self.prepare(x)
        out = self.branch(x)
        out += x
        return out


WRITTEN = {
    Overwritten: "        out = self.se(out)\n        out += x",
    Dropped: "x + self.drop_path(self.se(self.branch(x)))",
    Added: "out += self.se(self.branch(self.prepare(x)))",
    Method: "self.prepare(x).add(self.se(self.branch(x)))",
    Torch: "torch.add(self.se(self.branch(x)), self.prepare(x))",
    Looped: "x = self.se(self.branch(x)) + x",
    Joined: "torch.cat([x, *self.se(self.conv1(x), self.conv2(x))], dim=1)",
    Listed: "torch.cat([*maps[:1], *self.se(*maps[1:3])], 1)",
    All: "torch.cat(self.se(self.conv1(x), self.conv2(x)), dim=1)",
    AllListed: "torch.cat(self.se(*maps), dim=1)",
}


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda k: k.__name__)
def test_a_block_is_written_into_the_source(kind, tmp_path):
    net = nn.Sequential(nets.conv(3, 16), kind())
    injected = inject(net)
    assert WRITTEN[kind] in inspect.getsource(type(injected[1]))
    assert list(blocks(injected)) == ["1.se"]
    x = torch.randn(X)
    plan = get_plan(injected)
    assert sum(item.num_merges for item in (*plan.sites, *plan.passed_over)) == count_merges(net, x)
    for size in (16, 8, 5):
        assert_same_network(net, injected, torch.randn(2, 3, size, size + 1))
    nn.init.normal_(injected[1].se.fc2.weight)
    out = injected.eval()(x)
    assert not torch.equal(out, net.eval()(x))
    save(injected, tmp_path / "model.pt")
    for again in (copy.deepcopy(injected), pickle.loads(pickle.dumps(injected)), load(tmp_path / "model.pt", base=net)):
        assert torch.equal(again(x), out)


def test_spliced_code_compiles_in_one_graph():
    net = inject(nn.Sequential(nets.conv(3, 16), Looped())).eval()
    x = torch.randn(X)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


class Kept(Sized):
    """The map that is written over has another name."""

    def forward(self, x):
        out = self.branch(self.prepare(x))
        kept = out
        out += x
        return kept


class Twice(Sized):
    def forward(self, x):
        out = kept = self.branch(self.prepare(x))
        out += x
        return kept


class Held(Sized):
    def forward(self, x):
        out = self.branch(self.prepare(x))
        kept = [out]
        out += x
        return kept[0]


class Sometimes(Sized):
    def forward(self, x):
        out = self.prepare(x)
        if x.shape[2] > 4:
            out = self.branch(out)
        out += x
        return out


class Mutated(Sized):
    def forward(self, x):
        out = self.branch(self.prepare(x))
        out.add_(x)
        return out


class Function(Sized):
    def forward(self, x):
        return operator.add(self.prepare(x), self.branch(x))


class Helped(Sized):
    def forward(self, x):
        return self.join(self.prepare(x))

    def join(self, x):
        return x + self.branch(x)


class Summed(Sized):
    def forward(self, x):
        return sum([self.branch(x)], self.prepare(x))


class Apart(Sized):
    def forward(self, x):
        x = self.prepare(x)
        return torch.cat([self.conv1(x), x, self.conv2(x)], dim=1)


class Super(Dropped):
    def forward(self, x):
        x = super().prepare(x)
        return x + self.branch(x)


class Mangled(Sized):
    def __scale(self, x):
        return x

    def forward(self, x):
        x = self.prepare(x)
        return x + self.__scale(self.branch(x))


class Other(Sized):
    def forward(this, x):  # noqa: N805
        return x + this.branch(this.prepare(x))


REFUSED = [Kept, Twice, Held, Sometimes, Mutated, Function, Helped, Summed, Apart, Super, Mangled, Other]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda k: k.__name__)
def test_a_merge_without_room_for_a_block_is_passed_over(kind):
    plan = make_plan(nn.Sequential(nets.conv(3, 16), kind(), nets.Residual(48 if kind is Apart else 16)))
    assert [site.owner for site in plan.sites] == ["2"]
    assert {item.reason for item in plan.passed_over} == {"its code depends on the size or type of its input"}


class Resized(Sized):
    def forward(self, x):
        x = self.prepare(x)
        return torch.cat([x, F.interpolate(self.branch(x), size=x.shape[2:])], dim=1)


@pytest.mark.parametrize(
    ("placement", "kind", "channels"), [("pre", Dropped, 16), ("pre", Resized, 32), ("conv3x3", Dropped, 16)]
)
def test_what_is_gated_within_a_branch_has_no_room_in_the_source(placement, kind, channels):
    net = nn.Sequential(nets.conv(3, 16), kind(), nets.Residual(channels))
    plan = make_plan(net, placement=placement)
    assert [site.owner for site in plan.sites] == ["2"]
    assert "its code depends on the size or type of its input" in {item.reason for item in plan.passed_over}


def test_merges_of_one_line_that_differ_are_passed_over():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nets.conv(16 * n, 16) for n in (1, 2, 3)])

        def forward(self, x):
            for layer in self.layers:
                x = torch.cat([x, layer(F.relu(x) if x.shape[2] > 8 else x)], dim=1)
            return x

    plan = make_plan(nn.Sequential(nets.conv(3, 16), Growing(), nets.Residual(64)))
    assert [site.owner for site in plan.sites] == ["2"]
    assert {item.reason for item in plan.passed_over} == {"its code depends on the size or type of its input"}


def test_a_reason_that_a_doubt_hid_is_told():
    class Peers(Sized):
        def forward(self, x):
            x = self.prepare(x)
            return self.conv1(x) + self.conv2(x)

    plan = make_plan(nn.Sequential(nets.conv(3, 16), Peers(), nets.Residual()))
    assert [item.reason for item in plan.passed_over] == ["neither operand is a shortcut of the other"]


class InTurn(nn.Module):
    """Goes through its children, of which a block would be one more."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nets.conv(16, 16), nets.conv(16, 16)

    def forward(self, x):
        if x.shape[2] > 8:
            x = F.relu(x)
        for child in self.children():
            x = x + child(x)
        return x


def test_no_block_is_spliced_where_the_code_goes_through_its_children():
    plan = make_plan(nn.Sequential(nets.conv(3, 16), InTurn(), nets.Residual()))
    assert [site.owner for site in plan.sites] == ["2"]


GAIN, LIMIT, LINE, CALLS = 2.0, 1.0, None, 0
STEPS = types.SimpleNamespace(lock=threading.Lock(), n=0)  # cannot be copied


def make_line(size):
    global LINE  # noqa: PLW0603
    if LINE is None:
        LINE = torch.linspace(0, 1, size)


class Filed(Sized):
    def forward(self, x):
        global CALLS  # noqa: PLW0603
        CALLS += 1
        STEPS.n += 1
        make_line(x.shape[-1])
        y = self.branch(self.prepare(x)) * GAIN + LINE
        y = y * max([LIMIT * 1.0 for LIMIT in (0.5, 1.0)])  # a variable of its own
        return x + y


def test_variables_of_the_file_are_read_and_written_there(monkeypatch):
    net = nn.Sequential(nets.conv(3, 16), Filed()).eval()
    monkeypatch.setitem(globals(), "LINE", None)
    injected = inject(net, example=torch.zeros(X))
    assert LINE is None
    source = inspect.getsource(type(injected[1]))
    assert "test_splice.CALLS += 1" in source
    assert "[LIMIT * 1.0 for LIMIT in (0.5, 1.0)]" in source
    x = torch.randn(X)
    for gain in (2.0, 3.0):
        monkeypatch.setitem(globals(), "GAIN", gain)
        before = CALLS, STEPS.n
        for model in (net, injected, copy.deepcopy(injected), pickle.loads(pickle.dumps(injected))):
            assert torch.equal(model(x), net(x))
        assert (before[0] + 8, before[1] + 8) == (CALLS, STEPS.n)
    assert LINE is not None


def test_a_name_of_two_variables_is_left():
    class Twofold(Sized):
        def forward(self, x):
            y = self.branch(self.prepare(x)) * GAIN
            return x + y * max([GAIN * 1.0 for GAIN in (0.5, 1.0)])

    with pytest.raises(EmptyPlanError, match="depends on the size"):
        make_plan(nn.Sequential(nets.conv(3, 16), Twofold()))


def test_files_may_have_any_name(tmp_path, monkeypatch):
    path = tmp_path / "my-net.py"
    path.write_text(
        "from tests.test_splice import Sized\n\nGAIN = 2.0\n\n\nclass Scaled(Sized):\n    def forward(self, x):\n"
        "        x = self.prepare(x)\n        return x + self.branch(x) * GAIN\n"
    )
    specification = importlib.util.spec_from_file_location("my-net", path)
    file = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "my-net", file)
    specification.loader.exec_module(file)
    net = nn.Sequential(nets.conv(3, 16), file.Scaled())
    injected = inject(net)
    assert "file_0.GAIN" in inspect.getsource(type(injected[1]))
    file.GAIN = 3.0
    assert_same_network(net, injected, torch.randn(X))


class Masked(nets.Residual):
    """Goes another way without a mask."""

    def forward(self, x, mask):
        y = self.branch(x)
        if mask is not None:
            y = torch.maximum(y, mask)
        return x + y


class Typed(nets.Residual):
    def forward(self, x, mask):
        y = self.branch(x)
        return x + (torch.maximum(y, mask) if isinstance(mask, torch.Tensor) else y)


class Elsewhere(nets.Residual):
    def forward(self, x, mask):
        y = self._mask(self.branch(x), mask)
        return x + y

    def _mask(self, y, values):
        return y if values is None else torch.maximum(y, values)


class Handing(nn.Module):
    """Has a mask that may be left out."""

    def __init__(self, kind):
        super().__init__()
        self.block = kind(16)

    def forward(self, x, mask=None):
        return self.block(x, mask)


@pytest.mark.parametrize("kind", [Masked, Typed, Elsewhere])
def test_an_argument_that_was_there_at_the_example_may_be_left_out(kind):
    torch.manual_seed(0)
    network, x, mask = Handing(kind).eval(), torch.randn(2, 16, 8, 8), torch.rand(2, 16, 8, 8)
    injected = inject(network, r=4, example=(x, mask))
    assert len(blocks(injected)) == 1
    for given in ((x, mask), (x,)):
        assert torch.equal(injected(*given), network(*given))
    assert not torch.equal(network(x), network(x, mask))


class Given(nets.Residual):
    """As DLA's blocks."""

    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = x
        out = self.branch(x)
        out += shortcut
        return out


def test_a_block_stands_before_a_sum_that_is_written_on_its_map():
    torch.manual_seed(0)
    network, x = Given(16).eval(), torch.randn(2, 16, 8, 8)
    injected = inject(network, r=4, example=(x, x))
    text = inspect.getsource(type(injected))
    assert "        out = self.se(out)\n        out += shortcut\n" in text
    for given in ((x,), (x, torch.randn_like(x))):
        assert torch.equal(injected(*given), network(*given))


def test_code_that_asks_for_no_argument_stays_a_graph():
    class Plain(nets.Residual):
        attention = None

        def forward(self, x, scale):
            y = self.branch(x * scale)
            if self.attention is not None:
                y = self.attention(y)
            return x + y

    injected = inject(Handing(Plain).eval(), r=4, example=(torch.zeros(2, 16, 8, 8), torch.ones(1)))
    assert "attention" not in inspect.getsource(type(injected.block))
