import pytest
import torch
from torch import nn

from se_inject.block import SqueezeExcite, count_hidden


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_block_changes_nothing_in_any_float_format(dtype):
    x = torch.randn(2, 32, 5, 7).to(dtype)
    assert torch.equal(SqueezeExcite(32, dtype=dtype)(x), x)


def test_the_gate_is_the_formula_of_the_paper_times_two():
    block = SqueezeExcite(16, 2)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 16, 4, 4)
    z = x.mean((2, 3))
    hidden = torch.relu(z @ block.fc1.weight[:, :, 0, 0].T + block.fc1.bias)
    gate = 2 * torch.sigmoid(hidden @ block.fc2.weight[:, :, 0, 0].T + block.fc2.bias)
    torch.testing.assert_close(block(x), x * gate[:, :, None, None])


def test_a_block_knows_the_channels_that_its_layers_have():
    block = SqueezeExcite(32, 4)
    assert (block.channels, repr(block)) == (32, "SqueezeExcite(32, 4)")
    block.fc1, block.fc2 = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)  # as pruning leaves them
    assert (block.channels, repr(block)) == (24, "SqueezeExcite(24, 4)")


def test_several_maps_are_squeezed_together():
    block = SqueezeExcite(24, 2)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    a, b = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(torch.cat(block(a, b), 1), block(torch.cat([a, b], 1)))


@pytest.mark.parametrize(
    ("shape", "channel_dim", "axes"),
    [
        ((2, 16, 9), 1, (2,)),
        ((2, 16, 4, 5), 1, (2, 3)),
        ((2, 16, 3, 4, 5), 1, (2, 3, 4)),
        ((2, 4, 5, 16), -1, (1, 2)),
        ((2, 9, 16), -1, (1,)),
    ],
)
def test_the_right_dimensions_are_squeezed(shape, channel_dim, axes):
    block = SqueezeExcite(16, 2, num_spatial=len(axes), channel_dim=channel_dim)
    x = torch.randn(shape)
    assert torch.equal(block(x), x)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    hidden = torch.relu(x.mean(axes) @ block.fc1.weight[:, :, 0, 0].T + block.fc1.bias)
    gate = 2 * torch.sigmoid(hidden @ block.fc2.weight[:, :, 0, 0].T + block.fc2.bias)
    expected = x.movedim(channel_dim, 1) * gate.view(2, 16, *[1] * len(axes))
    torch.testing.assert_close(block(x), expected.movedim(1, channel_dim))
    left, right = SqueezeExcite(32, num_spatial=len(axes), channel_dim=channel_dim)(x, x)
    assert torch.equal(left, x)
    assert torch.equal(right, x)


@pytest.mark.parametrize(
    ("channels", "r", "divisor", "expected"),
    [(256, 16, 8, 16), (64, 16, 8, 8), (64, 16, 1, 4), (200, 16, 8, 16), (24, 16, 8, 8), (320, 16, 8, 24)],
)
def test_hidden_channels_are_rounded_as_timm_does(channels, r, divisor, expected):
    from timm.layers import make_divisible

    assert count_hidden(channels, r, divisor=divisor) == expected
    if divisor == 8:
        assert expected == make_divisible(channels / r, 8, round_limit=0.0)


def test_a_block_without_bias_has_weights_alone():
    assert [name for name, _ in SqueezeExcite(32, bias=False).named_parameters()] == ["fc1.weight", "fc2.weight"]


def test_a_block_shows_channels_and_ratio():
    assert repr(SqueezeExcite(256, 16)) == "SqueezeExcite(256, 16)"


def test_a_block_with_a_layer_of_another_kind_shows_what_it_knows():
    block = SqueezeExcite(256, 16)
    block.fc2 = nn.Sequential(block.fc2)
    assert repr(block) == "SqueezeExcite(?, 16)"
    assert "SqueezeExcite(?, 16)" in repr(nn.Sequential(block))


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_map_keeps_its_type(training):
    block = SqueezeExcite(32).train(training)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 32, 4, 4).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == dtype
            assert torch.equal(block(x), x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_map_that_was_cast_keeps_its_type(kind, training):
    block = SqueezeExcite(32, dtype=kind).train(training)
    torch.nn.init.normal_(block.fc2.weight)
    x = torch.randn(2, 32, 4, 4, requires_grad=True)
    y = block(x, shortcut=x)
    y.sum().backward()
    gate = block.compute_gate(x.detach().to(kind)).float()
    torch.testing.assert_close(y, x + x * gate[:, :, None, None], rtol=0.02, atol=0.02)
    assert (y.dtype, x.grad.dtype, block.fc1.weight.grad.dtype) == (torch.float32, torch.float32, kind)


def test_a_new_block_is_alive_for_every_image():
    for seed in range(50):
        torch.manual_seed(seed)
        block = SqueezeExcite(64, 16)
        hidden = torch.relu(block.fc1(torch.randn(1, 64, 1, 1).expand(2, -1, -1, -1)))
        assert int((hidden[0] > 0).sum()) == block.fc1.out_channels // 2


def test_w2_learns_from_the_first_step_and_w1_from_the_second():
    block = SqueezeExcite(32)
    x = torch.randn(4, 32, 4, 4)
    optimizer = torch.optim.SGD(block.parameters(), 1.0)
    for step in range(2):
        optimizer.zero_grad()
        (block(x) * torch.randn_like(x)).sum().backward()
        assert bool(block.fc2.weight.grad.any())
        assert bool(block.fc1.weight.grad.any()) == (step == 1)
        optimizer.step()
