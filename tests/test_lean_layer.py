"""Gradients past the map that a block scales: those of plain autograd, with less memory, and no hook waits in vain."""

import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from se_inject import SqueezeExcite, lean_layer, plain_autograd
from se_inject.lean import Link, scale_map, squeeze_map
from se_inject.traffic import ByteCounter, count_saved

SHAPES = {
    "contiguous": ((3, 8, 7, 6), None),
    "channels_last": ((3, 8, 7, 6), torch.channels_last),
    "one image": ((1, 8, 7, 6), torch.channels_last),
    "one dimension": ((3, 8, 40), None),
    "three dimensions": ((2, 8, 5, 3, 4), None),
    "channels_last_3d": ((2, 8, 5, 3, 4), torch.channels_last_3d),
}


class Branch(nn.Module):
    """The end of a bottleneck's branch: a 1x1 convolution to four times as many channels, its norm, and a block."""

    def __init__(self, num_spatial=2, **options):
        super().__init__()
        torch.manual_seed(0)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_spatial - 1]
        self.conv = convolution(8, 32, 1, **{"bias": False, **options})
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[num_spatial - 1](32)
        self.se = SqueezeExcite(32, 4, num_spatial=num_spatial)
        for parameter in (*self.norm.parameters(), *self.se.parameters()):
            nn.init.normal_(parameter, std=0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.double()

    def forward(self, x, shortcut=None):
        return self.se(self.norm(self.conv(x)), shortcut=shortcut)


@pytest.fixture
def uses(monkeypatch):
    """Counts how often the closed form is used."""
    counted = []
    squeeze = lean_layer._Squeeze.apply
    monkeypatch.setattr(lean_layer._Squeeze, "apply", lambda *args: counted.append(1) or squeeze(*args))
    return counted


def make_input(name="contiguous", num_channels=8, seed=1):
    (num, _, *sizes), layout = SHAPES[name]
    x = torch.randn(num, num_channels, *sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x if layout is None else x.contiguous(memory_format=layout)).requires_grad_()


def differentiate(model, *inputs):
    wanted = [x for x in (*inputs, *model.parameters()) if x.requires_grad]
    y = model(*inputs)
    return y, torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.shape[1]).view(-1, *[1] * (y.ndim - 2))).exp().sum(), wanted
    )


def compare(model, *inputs):
    y, found = differentiate(model, *inputs)
    with plain_autograd():
        plain, expected = differentiate(model, *inputs)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    assert len(y) == 1 or y.stride() == plain.stride()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("has_shortcut", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_plain_autograd(uses, name, training, has_shortcut):
    x = make_input(name)
    model = Branch(x.ndim - 2)
    model.norm.train(training)
    compare(model, x, *([make_input(name, 32, seed=2)] if has_shortcut else []))
    assert len(uses) == 1


FROZEN = {
    "x": 1, "conv": 1, "norm.weight": 1, "norm.bias": 1, "se": 1, "se.fc2": 1, "x norm.weight se": 1, "norm": 1,
    "x conv": 0,
}  # fmt: skip
"""What is frozen, and whether the closed form is used."""


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_needs_no_gradient(uses, frozen):
    x, model = make_input(), Branch()
    x.requires_grad_("x" not in frozen.split())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(f for f in frozen.split() if f != "x")))
    compare(model, x, make_input(num_channels=32, seed=2))
    assert len(uses) == FROZEN[frozen]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["conv.bias", "conv", "conv norm", "norm.bias conv.bias"])
def test_a_bias_before_the_norm_counts_where_it_does_not_learn_too(uses, frozen, training):
    x, model = make_input(), Branch(bias=True)
    nn.init.normal_(model.conv.bias, std=2)
    model.norm.train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen.split())))
    compare(model, x, make_input(num_channels=32, seed=2))
    assert not uses


def test_the_meta_device_has_no_autocast():
    model = Branch().to("meta")
    x = torch.empty(2, 8, 12, 12, dtype=torch.float64, device="meta", requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_gradient_in_another_layout_or_expanded_is_taken(uses):
    x, model = make_input("channels_last"), Branch()
    with plain_autograd():
        expected = torch.autograd.grad(model(x).sum(), x), torch.autograd.grad(model(x), x, make_input(num_channels=32))
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x), expected[0])
    torch.testing.assert_close(torch.autograd.grad(model(x), x, make_input(num_channels=32)), expected[1])
    assert uses


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_right(uses, training):
    model = Branch()
    model.norm.train(training)
    model.norm.track_running_stats = not training
    if training:
        model.norm.running_mean = model.norm.running_var = None
    names = [name for name, _ in model.named_parameters()]

    def run(x, *values):
        hidden = nn.functional.conv2d(x.tanh(), values[0][:8])  # what the convolution gets is made from its weight
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (hidden,))

    x = make_input()[:2, :, :4, :4].detach().requires_grad_()
    assert gradgradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in model.parameters())))
    assert uses


@pytest.mark.parametrize("frozen", ["nothing", "conv", "norm.weight", "se"])
def test_a_penalty_on_the_gradient_adds_to_the_loss(uses, frozen):
    x, model = make_input(), Branch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))

    def compute():
        y = model(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        return torch.autograd.grad(y.sum() + grad.square().sum(), wanted)

    found = compute()
    with plain_autograd():
        for ours, theirs in zip(found, compute(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert uses


def test_a_batch_without_images_has_a_gradient_of_zero():
    x, model = make_input()[:0].detach().requires_grad_(), Branch()
    model.norm.eval()
    model(x).sum().backward()
    assert model.conv.weight.grad.count_nonzero() == 0


def test_two_backward_passes_over_one_graph_add_up(uses):
    x, model = make_input(), Branch()
    y = model(x)
    y.sum().backward(retain_graph=True)
    once = model.conv.weight.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, 2 * once)
    assert uses


@pytest.mark.parametrize("part", ["mean", "map"])
def test_a_loss_of_the_gate_or_of_the_map_alone_is_differentiated(uses, part):
    x, model = make_input(), Branch()

    def run(x):
        y, link = model.norm(model.conv(x)), Link((2, 3), is_training=True)
        z, again = squeeze_map(y, link)
        return z if part == "mean" else scale_map(again, y, torch.ones_like(z)[..., None, None], link)

    wanted = [x, *model.conv.parameters(), *model.norm.parameters()]
    weight = torch.linspace(-1, 1, 32, dtype=torch.float64).view(32, *[1] * (0 if part == "mean" else 2))
    found = torch.autograd.grad((run(x) * weight).exp().sum(), wanted)
    y = model.norm(model.conv(x))
    expected = torch.autograd.grad(((y.mean((2, 3)) if part == "mean" else y) * weight).exp().sum(), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert uses


def test_the_wide_map_is_gone_after_the_forward_pass(uses):
    x, model = make_input(), Branch()
    maps = []
    for layer in (model.conv, model.norm):
        layer.register_forward_hook(lambda module, args, y: maps.append(weakref.ref(y.untyped_storage())))
    y = model(x, shortcut=make_input(num_channels=32))
    assert uses
    assert [ref() for ref in maps] == [None, None]
    y.sum().backward()


def test_less_is_kept_than_without_a_block(uses):
    """The plain network keeps what its norm was given."""
    x, model = make_input(), Branch()
    plain = count_saved(nn.Sequential(model.conv, model.norm), x)
    kept = count_saved(model, x)
    assert uses
    assert plain - kept == pytest.approx(4 * x.numel() * 8, abs=7000)  # the block keeps a few vectors of each image


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fewer_bytes_are_moved_than_without_a_block(layout):
    torch.manual_seed(0)
    model = Branch().float()
    x, shortcut, grad = (torch.randn(2, n, 96, 96).contiguous(memory_format=layout) for n in (8, 32, 32))
    x.requires_grad_()
    counted = {}
    for name, run in (("plain", lambda: model.norm(model.conv(x)) + shortcut), ("block", lambda: model(x, shortcut))):
        x.grad = None
        with ByteCounter() as counter:
            run().backward(grad)
        counted[name] = counter.count / grad.nbytes
    assert counted["block"] < counted["plain"]


class WatchedError(Exception):
    """A hook was called."""


def raise_watched(*_):
    raise WatchedError


@pytest.mark.parametrize("layer", ["conv", "norm"])
@pytest.mark.parametrize("watch", ["hook", "retain_grad", "module"])
def test_who_waits_for_a_maps_gradient_gets_it(uses, layer, watch):
    x, model = make_input(), Branch()
    module, maps = getattr(model, layer), []

    def look(_, args, y):
        if watch == "hook":
            y.register_hook(raise_watched)
        else:
            y.retain_grad()
            maps.append(y)

    if watch == "module":
        module.register_full_backward_hook(raise_watched)
    else:
        module.register_forward_hook(look)
    loss = model(x).square().sum()
    assert not uses
    if watch == "retain_grad":
        loss.backward()
        assert maps[0].grad.shape == maps[0].shape
    else:
        with pytest.raises(WatchedError):
            loss.backward()


@pytest.mark.parametrize("way", ["evaluation", "plain_autograd"])
def test_in_evaluation_and_on_request_every_map_has_a_gradient(uses, way):
    x, model, maps = make_input(), Branch(), []
    model.norm.register_forward_hook(lambda module, args, y: maps.append(y))
    if way == "evaluation":
        y = model.eval()(x)
    else:
        with plain_autograd():
            y = model(x)
    assert torch.autograd.grad(y.sum(), maps[0])[0].shape == maps[0].shape
    assert not uses


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"groups": 2}, {"kernel_size": 3, "padding": 1}, {"stride": 2}, {"padding": 1}]
)
def test_other_convolutions_go_the_other_way(uses, options):
    model = Branch()
    torch.manual_seed(0)
    model.conv = nn.Conv2d(8, 32, **{"kernel_size": 1, "bias": False, "dtype": torch.float64, **options})
    compare(model, make_input())
    assert not uses


def test_narrow_maps_and_half_precision_go_the_other_way(uses):
    model = Branch()
    compare(model, make_input()[:, :, :3, :5].detach().requires_grad_())  # 15 positions, 8 channels
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(make_input().detach().float()).sum().backward()
    assert not uses


@pytest.mark.parametrize("training", [True, False])
def test_in_fp32_the_error_is_that_of_plain_autograd(uses, training):
    torch.manual_seed(0)
    model = Branch()
    model.norm.train(training)
    x, shortcut = torch.randn(4, 8, 56, 56, dtype=torch.float64).relu(), torch.randn(4, 32, 56, 56, dtype=torch.float64)
    with plain_autograd():
        exact = differentiate(model, x.requires_grad_(), shortcut)[1]
    inputs = x.detach().float().requires_grad_(), shortcut.float()
    _, found = differentiate(model.float(), *inputs)
    with plain_autograd():
        _, plain = differentiate(model, *inputs)
    assert uses
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        error, allowed = ((y.double() - true).norm() / true.norm() for y in (ours, theirs))
        assert error < 3 * allowed + 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_branch_gives_the_same(reentrant):
    x, model = make_input(), Branch()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for ours, theirs in zip([x, *model.parameters()], expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-10)


tells_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="torch does not tell what hooks did"
)


@tells_hooks
def test_a_checkpoint_around_what_comes_before_the_block_runs_it_once_more_alone():
    x, model = make_input(), Branch()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    runs = []
    model.conv.register_forward_pre_hook(lambda *_: runs.append(1))
    y = model.se(checkpoint(lambda x: model.norm(model.conv(x)), x, use_reentrant=False))
    assert len(runs) == 1
    found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    assert len(runs) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


HOOKS = {
    "can be fetched once": (lambda: saved_tensors_hooks(lambda x: [x], lambda packed: packed.pop()), 1e-10),
    "is rounded": (lambda: saved_tensors_hooks(lambda x: x.float(), lambda packed: packed.double()), 1e-3),
    "is elsewhere": (save_on_cpu, 1e-10),
}
"""What becomes of what is kept, and how much the gradients may differ."""


@tells_hooks
@pytest.mark.parametrize("name", HOOKS)
def test_what_hooks_keep_in_another_form_does_not_change_the_output(uses, name):
    make, tolerance = HOOKS[name]
    x, model = make_input(), Branch()
    wanted = [x, *model.parameters()]
    with plain_autograd():
        expected = model(x)
    with make():
        y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(z.square().sum(), wanted) for z in (y, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not uses


def test_hooks_that_look_on_change_nothing(uses):
    x, model = make_input(), Branch()
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        model(x)
    assert uses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ["norm", "conv"])
def test_a_map_that_is_written_into_without_a_gradient_is_seen(uses, layer, training):
    x, model = make_input(), Branch().train(training)

    def write(layer, args, output):  # straight through, as a quantised layer does
        with torch.no_grad():
            output.copy_(output.mul(4).round() / 4)

    getattr(model, layer).register_forward_hook(write)
    compare(model, x, make_input(num_channels=32, seed=2))
    assert not uses


@pytest.mark.parametrize("layer", ["norm", "conv"])
def test_a_layer_whose_parameters_are_away_until_the_backward_pass_is_left_to_itself(uses, layer):
    x, model = make_input(), Branch()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    kept = {p: p.detach().clone() for p in getattr(model, layer).parameters()}
    sizes = {p: p.untyped_storage().nbytes() for p in kept}

    def free(*_):
        for p in kept:
            p.untyped_storage().resize_(0)

    def fetch(*_):
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(kept)):
            for p, value in kept.items():
                p.untyped_storage().resize_(sizes[p])
                p.copy_(value)

    handle = getattr(model, layer).register_forward_hook(free)
    y = model(x)
    fetch()
    handle.remove()
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert len(uses) == 1


def test_a_map_that_is_written_over_is_an_error(uses):
    x, model = make_input(), Branch()
    hidden = x * 1
    y = model(hidden)
    hidden.add_(1)
    assert uses
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_map_with_another_use_has_both_gradients(uses):
    x, model = make_input(), Branch()

    def run():
        y = model.norm(model.conv(x))
        return torch.autograd.grad((model.se(y) * y).sum(), [x, *model.parameters()])

    found = run()
    with plain_autograd():
        for ours, theirs in zip(found, run(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert uses


def test_a_pass_that_ended_at_the_gate_leaves_nothing_behind(uses):
    model, gates = Branch(), []
    model.se.fc2.register_forward_hook(lambda *args: gates.append(args[2]))
    y = model(x := make_input())
    torch.autograd.grad(y.square().sum(), [model.se.fc2.weight], retain_graph=True)
    found = torch.autograd.grad(gates[-1].square().sum(), [x, model.conv.weight, model.norm.weight])
    with plain_autograd():
        model(x)
        expected = torch.autograd.grad(gates[-1].square().sum(), [x, model.conv.weight, model.norm.weight])
    assert len(uses) == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_statistics_that_change_before_the_backward_pass_do_no_harm(uses):
    model, x = Branch(), make_input()
    model.norm.eval()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.norm.parameters()))
    loss = model(x).square().sum()
    model.norm.running_mean.add_(1.0)
    found = torch.autograd.grad(loss, list(model.norm.parameters()))
    assert len(uses) == 2
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_many_gradients_at_once(uses, name):
    model, x = Branch(), make_input(name)
    wanted = [x, *model.parameters()]
    many = torch.randn(3, 3, 32, 7, 6, dtype=torch.float64)
    found = torch.autograd.grad(model(x), wanted, many, is_grads_batched=True)
    assert len(uses) == 1
    each = [torch.autograd.grad(model(x), wanted, one) for one in many]
    for ours, theirs in zip(found, map(torch.stack, zip(*each, strict=True)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
