"""The block's training: the same numbers as plain autograd's, with fewer passes over the map."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from se_inject import SqueezeExcite, inject
from se_inject.lean import sum_products
from se_inject.traffic import ByteCounter, count_saved
from tests import nets

LAYOUTS = {
    "contiguous": ((3, 16, 12, 11), {}, None),
    "few positions": ((3, 16, 3, 2), {}, None),
    "channels_last": ((3, 16, 12, 11), {}, torch.channels_last),
    "channels_last, few positions": ((3, 16, 3, 2), {}, torch.channels_last),
    "one dimension": ((3, 16, 120), {"num_spatial": 1}, None),
    "three dimensions": ((2, 16, 5, 6, 7), {"num_spatial": 3}, None),
    "channels_last_3d": ((2, 16, 5, 6, 7), {"num_spatial": 3}, torch.channels_last_3d),
    "(N, H, W, C)": ((3, 12, 11, 16), {"channel_dim": -1}, None),
    "(N, L, C)": ((3, 120, 16), {"num_spatial": 1, "channel_dim": -1}, None),
}


def make_block(channels=16, dtype=torch.float64, **options):
    torch.manual_seed(0)
    block = SqueezeExcite(channels, 4, dtype=dtype, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def make_map(layout, dtype=torch.float64, seed=1):
    shape, options, memory = LAYOUTS[layout]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return (x if memory is None else x.contiguous(memory_format=memory)).requires_grad_(), options


def compute_plainly(block, *maps):
    """What the class says, written down with torch's own operators."""
    gates = block._split(block.compute_gate(*maps), maps)
    scaled = tuple(x * gate for x, gate in zip(maps, gates, strict=True))
    return scaled if len(scaled) > 1 else scaled[0]


def differentiate(function, block, maps, grads):
    outputs = function(*maps)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [*(x for x in maps if x.requires_grad), *(p for p in block.parameters() if p.requires_grad)]
    return outputs, torch.autograd.grad(outputs, wanted, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh"])
def test_gradients_are_those_of_plain_autograd(layout, gate):
    x, options = make_map(layout)
    block = make_block(gate=gate, **options)
    grad = make_map(layout, seed=2)[0].detach()
    (lean,), found = differentiate(block, block, [x], [grad])
    (plain,), expected = differentiate(lambda x: compute_plainly(block, x), block, [x], [grad])
    assert torch.equal(lean, plain)
    assert lean.stride() == plain.stride()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_maps_that_are_squeezed_together_have_theirs():
    maps = [make_map("contiguous", seed=i)[0] for i in range(3)]
    grads = [make_map("contiguous", seed=10 + i)[0].detach() for i in range(3)]
    block = make_block(48)
    outputs, found = differentiate(block, block, maps, grads)
    plain, expected = differentiate(lambda *maps: compute_plainly(block, *maps), block, maps, grads)
    assert all(map(torch.equal, outputs, plain))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["map", "block", "gate"])
def test_what_is_frozen_needs_no_gradient(frozen):
    x, _ = make_map("contiguous")
    block = make_block()
    if frozen == "map":
        x = x.detach()
    else:
        block.requires_grad_(False)
        block.fc1.weight.requires_grad_(frozen == "gate")
    grad = torch.ones_like(x)
    _, found = differentiate(block, block, [x], [grad])
    _, expected = differentiate(lambda x: compute_plainly(block, x), block, [x], [grad])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_expanded_or_sliced_is_taken():
    x, _ = make_map("channels_last")
    block = make_block()
    expected = torch.autograd.grad(compute_plainly(block, x)[:, :, ::2].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(block(x)[:, :, ::2].sum(), x), expected)


@pytest.mark.parametrize("layout", ["few positions", "channels_last, few positions"])
def test_first_and_second_derivatives_are_right(layout):
    x, _ = make_map(layout)
    block = make_block()
    names = [name for name, _ in block.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_a_penalty_on_the_gradient_adds_to_the_loss():
    """Here first and second derivatives meet in one backward pass."""
    x, _ = make_map("contiguous")
    block = make_block()

    def compute_loss(function):
        y = function(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y.sum() + grad.square().sum()

    wanted = [x, *block.parameters()]
    found = torch.autograd.grad(compute_loss(block), wanted)
    expected = torch.autograd.grad(compute_loss(lambda x: compute_plainly(block, x)), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_two_backward_passes_over_one_graph_add_up():
    x, _ = make_map("contiguous")
    block = make_block()
    y = block(x)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same(reentrant):
    x, _ = make_map("contiguous")
    block = make_block()
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bf16_sums_in_fp32(layout):
    x, _ = make_map(layout, torch.bfloat16)
    other, _ = make_map(layout, torch.bfloat16, seed=2)
    found, sums = sum_products(x.detach(), other.detach(), (2, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (x.double() * other.double()).sum((2, 3)), rtol=1e-5, atol=1e-4)


def test_under_autocast_the_gradients_keep_their_types():
    x, _ = make_map("contiguous", torch.float32)
    block = make_block(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x.bfloat16())
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, block.fc1.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (expected,) = torch.autograd.grad(compute_plainly(block, x.bfloat16()).float().sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_transforms_of_functions_go_the_plain_way():
    x, _ = make_map("few positions")
    x = x.detach()
    block = make_block()
    tangent = torch.randn_like(x)
    _, expected = torch.autograd.functional.jvp(block, x, tangent)
    torch.testing.assert_close(torch.func.jvp(block, (x,), (tangent,))[1], expected)
    each = torch.func.vmap(torch.func.grad(lambda x: block(x[None]).square().sum()))(x)
    torch.testing.assert_close(each, torch.autograd.functional.vjp(lambda x: block(x).square().sum(), x)[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(block(dual)).tangent, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_block_holds_torchs_operators_alone():
    x, _ = make_map("few positions")
    block = make_block()
    traced = torch.jit.trace(block, x)
    assert "PythonOp" not in str(traced.graph)
    assert torch.equal(traced(x), block(x))
    graph = torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(block)))
    assert torch.equal(graph(x), block(x))


class Normed(nn.Module):
    """A convolution, its norm and a block, as at the end of a residual branch."""

    def __init__(self, num_spatial=2, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_spatial - 1](16, 16, 1, dtype=torch.float64)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[num_spatial - 1](
            16, dtype=torch.float64, **options
        )
        if self.norm.affine:
            nn.init.uniform_(self.norm.weight, 0.5, 2)
            nn.init.normal_(self.norm.bias)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.se = make_block(num_spatial=num_spatial)
        self.is_plain = False

    def forward(self, x):
        x = self.norm(self.conv(x))
        return compute_plainly(self.se, x) if self.is_plain else self.se(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if not x.startswith("(")])
def test_behind_a_batch_norm_the_gradients_are_the_same_and_the_map_is_not_kept(layout, training):
    x, options = make_map(layout)
    model = Normed(options.get("num_spatial", 2)).train(training)
    found = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    kept = count_saved(model, x)
    model.is_plain = True
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert count_saved(model, x) - kept == pytest.approx(x.numel() * 8, abs=512)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": True}])
@pytest.mark.parametrize("frozen", ["", "norm", "norm.bias", "conv"])
def test_norms_without_parameters_or_with_frozen_ones_are_right_and_the_map_is_not_kept(options, frozen):
    x, _ = make_map("contiguous")
    model = Normed(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(model(x).square().sum(), wanted)
    kept = count_saved(model, x)
    model.is_plain = True
    assert count_saved(model, x) - kept == pytest.approx(x.numel() * 8, abs=1024)
    for ours, theirs in zip(found, torch.autograd.grad(model(x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_a_penalty_on_the_gradient_goes_through_the_norm(training):
    x, _ = make_map("few positions")
    model = Normed().train(training)

    def compute_gradients():
        y = model(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.sum() + grad.square().sum(), [x, *model.parameters()])

    found = compute_gradients()
    model.is_plain = True
    for ours, theirs in zip(found, compute_gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_norm_gives_the_same(reentrant):
    x, _ = make_map("contiguous")
    model = Normed()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for ours, theirs in zip([x, *model.parameters()], expected, strict=True):
        # Where the map itself is kept, the products are added up in another order.
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-10)


def test_behind_a_norm_bf16_is_as_near_as_plain_autograd():
    x = make_map("contiguous")[0].detach()
    model = Normed()
    exact = torch.autograd.grad(model(x).square().sum(), model.se.fc2.weight)[0]
    model = model.float()
    errors = []
    for is_plain in (False, True):
        model.is_plain = is_plain
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x.float())
        (found,) = torch.autograd.grad(y.float().square().sum(), model.se.fc2.weight)
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[0] < 1.5 * errors[1] < 0.05


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "(N, H, W, C)"])
def test_seven_passes_over_the_map_are_all(layout):
    """The mean reads one, the product two; in the backward pass the sum reads two, the gradient reads and writes."""
    shape, options, memory = LAYOUTS[layout]
    larger = [size * (4 if size > 3 and size != 16 else 1) for size in shape]
    x = torch.randn(larger).contiguous(memory_format=memory or torch.contiguous_format).requires_grad_()
    block = make_block(dtype=torch.float32, **options)
    grad = torch.ones_like(x)
    with ByteCounter() as lean:
        block(x).backward(grad)
    with ByteCounter() as plain:
        compute_plainly(block, x).backward(grad)
    size = x.numel() * x.element_size()
    assert lean.count / size == pytest.approx(7, abs=0.05)
    assert plain.count / size > 13


class Narrow(nn.Module):
    """A block behind a norm behind a convolution whose input is narrower than its output."""

    def __init__(self, num_spatial=2, **options):
        super().__init__()
        torch.manual_seed(0)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_spatial - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[num_spatial - 1]
        self.conv = convolution(16, 64, **{"kernel_size": 1, **options})
        self.norm = norm(64)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.normal_(self.norm.bias)
        self.se = make_block(64, num_spatial=num_spatial, dtype=None)
        self.is_plain = False
        self.double()

    def forward(self, x):
        x = self.norm(self.conv(x))
        return compute_plainly(self.se, x) if self.is_plain else self.se(x)


def count_bytes(model, x):
    with ByteCounter() as counter:
        model(x)
    return counter.count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 4}, {"num_spatial": 1}, {"num_spatial": 3}])
def test_a_map_is_squeezed_through_the_convolution_that_made_it(options, training):
    x = make_map({1: "one dimension", 3: "three dimensions"}.get(options.get("num_spatial"), "contiguous"))[0]
    model = Narrow(**options).train(training)
    wanted = [x, *model.parameters()]
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), wanted)
    counted = count_bytes(model, x)
    model.is_plain = True
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(found, torch.autograd.grad(model(x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert counted < count_bytes(model, x) - x.numel() * 8  # the map has four times x's size


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"padding": 1}, {"stride": 2}])
def test_a_convolution_over_several_positions_is_not_squeezed_through(options):
    x = make_map("contiguous")[0]
    model = Narrow(**options)
    y = model(x)
    model.is_plain = True
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize("shape", ["alike", "another layout", "another type"])
def test_a_shortcut_is_added_with_its_gradient(shape, is_normed):
    x = make_map("contiguous")[0]
    shortcut = make_map("contiguous", torch.float32 if shape == "another type" else torch.float64, seed=3)[0]
    if shape == "another layout":
        shortcut = shortcut.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    model = Normed()
    branch = model.norm(model.conv(x)) if is_normed else x * 1
    wanted = [x, shortcut, *model.se.parameters()]
    y = model.se(branch, shortcut=shortcut)
    found = torch.autograd.grad(y.square().sum(), wanted)
    branch = model.norm(model.conv(x)) if is_normed else x * 1
    expected = shortcut + compute_plainly(model.se, branch)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.se(branch, shortcut=shortcut), expected)  # the norm has freed what it kept
    with torch.no_grad():
        torch.testing.assert_close(model.se(branch, shortcut=shortcut), expected)
    new = SqueezeExcite(16, dtype=torch.float64)
    assert torch.equal(new(branch, shortcut=shortcut), branch + shortcut)


def test_a_shortcut_costs_no_pass_of_its_own():
    block, x, shortcut = SqueezeExcite(64), torch.randn(2, 64, 28, 28), torch.randn(2, 64, 28, 28)
    size = x.numel() * 4
    with torch.no_grad(), ByteCounter() as counter:
        block(x, shortcut=shortcut)
    assert counter.count == pytest.approx(4 * size, rel=0.05)  # the mean, then two are read and one is written


def test_compiled_training_keeps_no_more_than_the_plain_network():
    """The compiler's partitioner computes again what is cheap, and blocks give it nothing that is not."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nets.Residual(32), nets.Residual(32))
    x = torch.randn(2, 3, 16, 16)
    injected = inject(plain, r=4, example=x)
    kept = [count_saved(torch.compile(model, backend="aot_eager_decomp_partition"), x) for model in (plain, injected)]
    assert kept[0] <= kept[1] < 1.01 * kept[0]


def test_under_autocast_the_squeeze_is_as_exact_as_a_mean():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
    seen = []
    block = SqueezeExcite(64, 4)
    block.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    x = 2 + torch.rand(4, 16, 12, 12)  # whose means are far above their deviations
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(conv(x))
        block(y)
    exact = y.double().mean((2, 3))
    # It is rounded as what it is handed is, and the sum that the norm takes the mean off is not rounded once more.
    assert (seen[0].double() - exact).abs().max() < 0.1 * exact.abs().max()
