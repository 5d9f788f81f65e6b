import pytest
import torch
from torch import nn

from se_inject import make_plan
from se_inject.calls import Call, Entry
from se_inject.errors import EmptyPlanError
from se_inject.inspection import inspect_entry
from se_inject.places import Placing
from se_inject.twin import make_twin
from tests import nets

SHAPE = (2, 16, 8, 8)


def find(module, *args):
    twin = make_twin(module)
    tensors = [twin.make_tensor(a, torch.float32) for a in args or [SHAPE]]
    found = inspect_entry(twin, Entry(""), Call(tuple(tensors), {}), Placing())
    return [place for place in found.places if place.operations]


def only(module, *args):
    merges = find(module, *args)
    assert len(merges) == 1
    return merges[0]


def labels(merge):
    return [edge.label for edge in merge.edges]


@pytest.mark.parametrize(
    ("net", "code"),
    [
        (nets.Residual, "F.relu(self.branch(x) + x)"),
        (nets.ResidualInPlace, "out += x"),
        (nets.ResidualTorchAdd, "torch.add(x, self.branch(x))"),
        (nets.ResidualMethodAdd, "self.branch(x).add(x)"),
        (nets.ResidualAddStatement, "out.add_(x)"),
    ],
)
def test_a_residual_sum_is_found_however_it_is_written(net, code):
    merge = only(net())
    assert (merge.kind, merge.code, labels(merge), merge.channels, merge.reason) == ("residual", code, ["bn2"], 16, "")


def test_with_a_projection_the_branch_is_the_side_with_more_layers():
    assert labels(only(nets.Projected())) == ["bn2"]


def test_a_sum_of_three_is_one_merge_of_two_additions():
    merge = only(nets.SumOfThree())
    assert (labels(merge), len(merge.operations), merge.channels, merge.reason) == (["a", "b"], 2, 32, "")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_that_is_added_to_itself_is_one_more_addition(in_place):
    class Doubled(nets.Residual):
        def forward(self, x):
            out = x + self.branch(x)
            if in_place:
                out += out
                return out
            return out + out

    merge = only(Doubled())
    assert (merge.kind, labels(merge), len(merge.operations), merge.reason) == ("residual", ["bn2"], 2, "")


def test_the_block_goes_before_layer_scale_and_dropout():
    merge = only(nets.Dropped())
    assert labels(merge) == ["bn2"]
    assert merge.edges[0].consumers == ("mul",)


def test_drop_path_of_timm_and_torchvision_is_walked_over():
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    for drop in (DropPath(0.2), StochasticDepth(0.2, "row")):

        class WithDrop(nets.Residual):
            def __init__(self, drop=drop):
                super().__init__()
                self.drop = drop

            def forward(self, x):
                return x + self.drop(self.branch(x))

        merge = only(WithDrop())
        assert (labels(merge), merge.edges[0].consumers) == (["bn2"], ("drop",))


def test_a_shortcut_that_is_handed_in_is_a_shortcut():
    merge = only(nets.Optional(), SHAPE, SHAPE)
    assert (merge.kind, labels(merge), merge.reason) == ("residual", ["bn2"], "")


def test_every_branch_of_a_concatenation_is_gated_together():
    merge = only(nets.Fire())
    assert (merge.kind, merge.channels, [e.channels for e in merge.edges]) == ("concat", 32, [12, 20])


def test_dense_connections_and_untouched_halves_pass_through():
    assert labels(only(nets.Dense())) == ["layers.0", "layers.1", "layers.2"]
    assert labels(only(nets.Shuffle(), (2, 32, 8, 8))) == ["branch"]


def test_a_stage_whose_operands_all_pass_through_is_gated_over_all():
    merge = only(nets.UpStage(32, 16, 16), (2, 32, 4, 4), SHAPE)
    assert (merge.kind, merge.channels, merge.reason) == ("concat", 48, "")


def test_a_list_that_is_handed_in_is_merged_by_the_parent():
    twin = make_twin(nets.DenseLayer(24, 8))
    maps = [twin.make_tensor((2, c, 8, 8), torch.float32) for c in (16, 8)]
    merge = inspect_entry(twin, Entry(""), Call((maps,), {}), Placing()).places[0]
    assert merge.reason == "it joins a list that it is handed; those features are merged again by its parent"


def test_a_branch_with_channel_attention_is_passed_over():
    assert only(nets.Attentive()).reason == "its branch already carries channel attention (mul)"


@pytest.mark.parametrize("name", ["eca", "se", "ese", "cbam"])
def test_attention_of_timm_is_recognised_by_its_structure(name):
    from timm.layers import create_attn

    class WithAttention(nets.Residual):
        def __init__(self):
            super().__init__()
            self.attn = create_attn(name, 16)

        def forward(self, x):
            return x + self.attn(self.branch(x))

    assert "channel attention (attn)" in only(WithAttention()).reason


def test_of_several_attentions_the_first_is_named_each_time():
    from timm.layers import SEModule

    class Twice(nets.Residual):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (SEModule(16) for _ in range(3))

        def forward(self, x):
            return x + self.third(self.second(self.first(self.branch(x))))

    reasons = {only(Twice()).reason for _ in range(10)}
    assert reasons == {"its branch already carries channel attention (first)"}


def test_parallel_linear_layers_are_a_fusion():
    merge = only(nets.RepVgg())
    assert merge.kind == "fusion"
    assert "re-parameterised" in merge.reason


def test_operands_without_a_shortcut_are_a_fusion():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.lateral, self.top = nets.conv(16, 16, kernel=1), nets.conv(16, 16, kernel=1)

        def forward(self, x, y):
            return self.lateral(x) + self.top(y)

    merge = only(Pyramid(), SHAPE, SHAPE)
    assert (merge.kind, merge.reason) == ("fusion", "neither operand is a shortcut of the other")


def test_a_branch_without_a_convolution_is_passed_over():
    class Pooled(nn.Module):
        def forward(self, x):
            return x + torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    assert only(Pooled()).reason == "its branch holds no convolution"


def test_channels_last_activations_have_their_channels_last():
    class Last(nets.Residual):
        def forward(self, x):
            y = self.branch(x).permute(0, 2, 3, 1)
            return x.permute(0, 2, 3, 1) + y

    merge = only(Last(), (2, 16, 8, 10))
    assert (merge.channel_dim, merge.channels, merge.reason) == (-1, 16, "")


def test_tokens_have_their_channels_last_and_maps_made_of_them_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.conv = nn.Linear(16, 16), nets.conv(16, 16)

        def forward(self, x):
            tokens = self.fc(x.flatten(2).transpose(1, 2))
            last = tokens.view(-1, 8, 10, 16)
            back = tokens.transpose(1, 2).reshape(-1, 16, 8, 10)
            return last + self.conv(back).permute(0, 2, 3, 1), back + self.conv(torch.relu(self.conv(back)))

    last, first = find(Tokens(), (2, 16, 8, 10))
    assert (last.channel_dim, last.channels) == (-1, 16)
    assert (first.channel_dim, first.channels) == (1, 16)


def test_a_concatenation_on_a_gated_branch_is_left_to_its_end():
    class InceptionResidual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.up = nets.conv(16, 8), nets.conv(16, 8), nets.conv(16, 16, kernel=1)

        def forward(self, x):
            out = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
            return self.up(out) * 0.2 + x

    concat, residual = find(InceptionResidual())
    assert concat.reason == "it lies on the branch of `self.up(out) * 0.2 + x`, which is gated"
    assert (labels(residual), residual.reason) == (["up"], "")


def test_a_sum_whose_branch_is_gated_is_not_gated_again_where_it_is_joined():
    class DualPath(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nets.conv(16, 16), nets.conv(16, 12)

        def forward(self, x):
            out = self.conv2(torch.relu(self.conv1(x)))
            return torch.cat([x[:, :8] + out[:, :8], x[:, 8:], out[:, 8:]], 1)

    residual, concat = find(DualPath())
    assert (residual.kind, residual.channels, residual.reason) == ("residual", 8, "")
    assert (concat.kind, concat.channels, concat.reason) == ("concat", 4, "")


def test_a_branch_that_is_written_over_later_is_passed_over():
    assert "is overwritten in place afterwards (mul_)" in find(nets.WrittenOver())[0].reason


def test_a_sum_written_over_an_alias_that_is_read_again_is_passed_over():
    class Aliased(nets.Residual):
        def forward(self, x):
            out = self.branch(x)
            view = out[:, :4]
            out += x
            return out, view

    assert "its sum is written over" in only(Aliased()).reason


def test_merges_that_differ_between_the_modes_are_passed_over():
    class Differing(nets.Residual):
        def forward(self, x):
            out = x + self.branch(x)
            return out + self.conv2(torch.relu(self.conv1(out))) if self.training else out

    assert [m.reason for m in find(Differing())] == ["its merges differ between train and eval mode"]


def test_a_convolution_of_one_tensor_is_no_merge():
    class Single(nn.Module):
        def forward(self, x):
            return torch.cat([x], 1) + 1.0 + x.mean((2, 3), keepdim=True)

    assert find(Single()) == []


def test_a_sum_written_on_a_part_of_a_larger_map_is_passed_over():
    class Part(nets.Residual):
        def forward(self, x):
            out = self.branch(torch.cat([x, x], 2)).chunk(2, 2)[1]
            out += x
            kept = out.contiguous()
            out.mul_(0.5)
            return kept

    assert "its branch is a part of a larger map" in find(Part())[0].reason


class Heads(nn.Module):
    """A detector's heads: predictions of all positions of all levels are joined, (N, H * W * A, K)."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.head = nets.conv(3, 16), nets.Residual(), nets.conv(16, 12)

    def forward(self, x):
        x = self.down(self.stem(x))
        found = []
        for level in (x, torch.nn.functional.avg_pool2d(x, 2)):
            boxes = self.head(level)
            n, _, h, w = boxes.shape
            found.append(boxes.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4))
        return torch.cat(found, dim=1)


def test_positions_are_not_taken_for_channels():
    plan = make_plan(Heads())
    assert [site.owner for site in plan.sites] == ["down"]
    assert plan.passed_over == ()


class Heads2d(nn.Module):
    """Attention of several heads over the positions of a map, as (N, heads, C, L)."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nets.conv(3, 16), nets.conv(16, 48), nets.conv(16, 16)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 4, 12, h * w).split(4, dim=2)
        out = (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).reshape(n, 16, h, w)
        return x + self.proj(torch.cat([out, out], 1)[:, :16])


def test_channels_are_followed_through_heads():
    plan = make_plan(Heads2d())
    assert [(site.channels, site.channel_dim) for site in plan.sites] == [(16, 1), (16, 1)]
    assert plan.passed_over == ()


def test_a_number_that_is_made_of_tokens_has_no_layout():
    class Scaled(nets.Residual):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            tokens = self.norm(x.flatten(2).transpose(1, 2))
            return x + self.branch(x) / tokens.square().sum()

    assert len(make_plan(nn.Sequential(nets.conv(3, 16), Scaled())).sites) == 1


def test_maps_whose_channels_are_split_over_heads_are_passed_over():
    class Heads(nn.Module):
        """A convolution of values, added to attention, as (N, heads, L, C / heads)."""

        def __init__(self):
            super().__init__()
            self.stem, self.qkv, self.conv = nets.conv(3, 16), nn.Linear(16, 48), nets.conv(16, 16)

        def forward(self, x):
            x = self.stem(x)
            n, c, h, w = x.shape
            q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).view(n, h * w, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            local = v.transpose(-1, -2).reshape(n, c, h, w)
            for _ in range(3):
                local = self.conv(local)
            local = local.view(n, 4, 4, h * w).transpose(-1, -2)
            return (q @ (k.transpose(-1, -2) @ v) + q * local).sum((2, 3))

    with pytest.raises(EmptyPlanError, match="its channels are split over several dimensions"):
        make_plan(Heads(), example=torch.zeros(2, 3, 8, 8))
