"""Other channel attention than our own, made an exact identity or refused."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_inject import Plan, blocks, inject, load, save
from se_inject.errors import ArtifactError, OptionError
from se_inject.rewrite import get_plan
from tests import nets
from tests.equality import assert_same_network


class Excite(nn.Module):
    """A block as people write it, with the gate's activation as a function."""

    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, channels)

    def squeeze(self, x):
        return self.fc2(F.silu(self.fc1(x.mean((2, 3)))))

    def forward(self, x):
        return x * torch.sigmoid(self.squeeze(x))[:, :, None, None]


class ExciteTanh(Excite):
    def forward(self, x):
        return torch.tanh(self.squeeze(x)).view(x.size(0), -1, 1, 1) * x


class ExciteTwice(Excite):
    """A sigmoid that is no gate comes first."""

    def squeeze(self, x):
        z = self.fc1(x.mean((2, 3)))
        return self.fc2(z * torch.sigmoid(z))


class ExciteModules(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Hardsigmoid())

    def forward(self, x):
        return x * self.body(x)


class ExciteSoftmax(Excite):
    def forward(self, x):
        return x * F.softmax(self.squeeze(x), 1)[:, :, None, None]


class ExciteRelu(Excite):
    """A gate behind a ReLU: with zero before it, nothing would ever learn."""

    def forward(self, x):
        return x * torch.sigmoid(F.relu(self.squeeze(x)))[:, :, None, None]


class Untouched(nn.Module):
    def forward(self, x):
        return x


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Shrinking(nn.Module):
    def forward(self, x):
        return x[:, :, ::2]


def build():
    return nets.enliven(nets.wrap(nets.Residual()))


NAMES = ["ese", "eca", "ecam", "ceca", "ge", "gc", "cbam", "lcbam"]


@pytest.mark.parametrize("name", NAMES)
def test_attention_of_timm_is_made_an_exact_identity(name, tmp_path):
    model, x = build(), torch.randn(2, 3, 16, 16)
    injected = inject(model, block=name)
    plan = get_plan(injected)
    assert plan.block == name
    (path,) = blocks(injected)
    (site,) = plan.sites
    assert site.num_parameters == sum(p.numel() for p in blocks(injected)[path].parameters()) > 0
    assert_same_network(model, injected, x)
    assert any(p.grad.any() for p in blocks(injected)[path].parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.eval()(x), injected.eval()(x))
    for dtype in (torch.bfloat16, torch.float64):
        low = build().to(dtype)
        with torch.no_grad():
            assert torch.equal(low.eval()(x.to(dtype)), inject(low, block=name).eval()(x.to(dtype)))
    pickle.loads(pickle.dumps(injected))
    save(injected, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", base=model)
    assert_same_network(model, again, x)


@pytest.mark.parametrize("factory", [Excite, ExciteTanh, ExciteTwice, ExciteModules])
def test_a_block_of_ones_own_is_made_an_exact_identity(factory, tmp_path):
    model, x = build(), torch.randn(2, 3, 8, 8)
    injected = inject(model, block=factory)
    assert_same_network(model, injected, x)
    (block,) = blocks(injected).values()
    assert isinstance(block, factory)
    optimizer = torch.optim.SGD(injected.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        injected.train()(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.any() for p in block.parameters())


def test_a_block_that_is_the_identity_is_taken_as_it_is():
    injected = inject(build(), block=lambda _: Untouched())
    (block,) = blocks(injected).values()
    assert type(block) is Untouched


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (ExciteSoftmax, "its output is not its input times gates"),
        (ExciteRelu, "its gate's input comes from relu, which cannot be zeroed"),
        (lambda _: Doubling(), "its output is not its input times gates"),
        (lambda _: Shrinking(), r"it gives \(4, 16, 8, 16\) for a map \(4, 16, 16, 16\)"),
        (lambda _: None, "gave a NoneType; it must give a torch.nn.Module"),
        (lambda _: nn.Linear(3, 3), "it does not run on a map"),
        ("nl", "its output is not its input times gates"),
        ("sk", "its output is not its input times gates"),
        ("gca", "its output is not its input times gates"),
        ("bottleneck", "cannot be made for 16 channels"),
        ("se2", "it must be se, a name of timm's create_attn"),
        (3, "give a name or a function that takes a channel count"),
    ],
)
def test_a_block_that_cannot_be_made_exact_is_refused_with_the_reason(factory, reason):
    model = build()
    with pytest.raises(OptionError, match=reason):
        inject(model, block=factory, inplace=True)
    assert not blocks(model)


def test_a_file_with_blocks_of_ones_own_asks_for_their_function(tmp_path):
    model, x = build(), torch.randn(2, 3, 8, 8)
    injected = inject(model, block=Excite)
    save(injected, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="give load.*block=. the function that makes its blocks"):
        load(tmp_path / "model.pt", base=model)
    assert_same_network(model, load(tmp_path / "model.pt", base=model, block=Excite), x)
    again = inject(model, plan=Plan.from_json(get_plan(injected).to_json()), block=Excite)
    assert_same_network(model, again, x)


def test_maps_of_another_layout_are_left_to_our_own_block():
    class Signal(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv1, self.conv2 = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3, 1, 1), nn.Conv1d(8, 8, 3, 1, 1)

        def forward(self, x):
            x = self.stem(x)
            return x + self.conv2(F.relu(self.conv1(x)))

    with pytest.raises(ValueError, match=r"eca takes maps \(N, C, H, W\) alone"):
        inject(Signal(), block="eca")


def test_each_branch_of_a_concatenation_has_a_block_of_its_own():
    model = nets.wrap(nets.Fire())
    injected = inject(model, block="eca")
    assert len(blocks(injected)) == 2
    assert_same_network(model, injected, torch.randn(2, 3, 8, 8))
