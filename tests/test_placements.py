"""Where the blocks stand: every placement, at every kind of merge."""

import inspect

import pytest
import timm
import torch
import torchvision
from torch import nn

from se_inject import Plan, blocks, inject, make_plan
from se_inject.errors import EmptyPlanError, OptionError
from se_inject.rewrite import get_plan
from tests import nets
from tests.equality import assert_same_network

PLACEMENTS = ["standard", "pre", "post", "identity", "conv3x3"]
RESIDUALS = [
    nets.Residual,
    nets.ResidualInPlace,
    nets.ResidualTorchAdd,
    nets.ResidualAddStatement,
    nets.Projected,
    nets.Dropped,
    nets.TrainBranch,
    nets.Optional,
]
CONCATS = [nets.Dense, nets.Fire]


class Bottleneck(nn.Module):
    """ResNet's, as timm and torchvision write it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nets.conv(16, 8, kernel=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nets.conv(8, 8), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nets.conv(8, 16, kernel=1), nn.BatchNorm2d(16)
        self.downsample = nn.Sequential(nets.conv(16, 16, kernel=1), nn.BatchNorm2d(16))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("block", [*RESIDUALS, *CONCATS, Bottleneck, nets.SumOfThree])
def test_every_placement_is_an_exact_identity(block, placement):
    model = nets.enliven(nets.wrap(block()))
    if (block, placement) == (nets.SumOfThree, "conv3x3"):
        with pytest.raises(EmptyPlanError, match="for placement conv3x3 it must have one branch"):
            inject(model, placement=placement)
        return
    injected = inject(model, placement=placement)
    plan = get_plan(injected)
    x = torch.randn(4, 3, 8, 8)
    assert_same_network(model, injected, x)
    for path, module in blocks(injected).items():
        assert module.fc2.weight.grad.any(), path
    again = inject(model, plan=Plan.from_json(plan.to_json()))
    assert_same_network(model, again, x)
    again.load_state_dict(injected.state_dict())


@pytest.mark.parametrize(
    ("placement", "expected", "channels"),
    [
        (
            "standard",
            ["out = self.bn3(out)", "downsample = self.downsample(x)", "out = self.se(out, shortcut=downsample)"],
            16,
        ),
        ("pre", ["out = self.se(x)", "out = self.conv1(out)"], 16),
        ("post", ["out += downsample", "out = self.relu(out)", "return self.se(out)"], 16),
        ("identity", ["out_2 = self.downsample(x)", "out_2 = self.se(out_2)", "out += out_2"], 16),
        ("conv3x3", ["out = self.bn2(out)", "out = self.relu(out)", "out = self.se(out)", "out = self.conv3(out)"], 8),
    ],
)
def test_the_block_stands_where_the_placement_says(placement, expected, channels):
    injected = inject(nets.wrap(Bottleneck()), placement=placement)
    (site,) = get_plan(injected).sites
    assert site.channels == channels
    written = [line.strip() for line in inspect.getsource(type(injected[1])).splitlines()]
    first = written.index(expected[0])
    assert written[first : first + len(expected)] == expected
    assert sum("self.se(" in line for line in written) == 1
    assert any("self.downsample(x)" in line for line in written)  # the shortcut keeps the raw input


# Blocks, and the parameters of all blocks by the formula 2 C C/r + C + C/r over the stages' channels.
FIGURES = {"standard": (16, 2_530_992), "post": (16, 2_530_992), "identity": (16, 2_530_992), "conv3x3": (16, 161_196)}


@pytest.mark.parametrize("placement", FIGURES)
def test_a_resnet50_has_the_right_count_and_parameters(placement):
    plan = make_plan(torchvision.models.resnet50(num_classes=4), placement=placement, divisor=1)
    assert (len(plan.sites), plan.num_parameters) == FIGURES[placement]


def test_before_the_branch_a_block_has_the_channels_of_the_input():
    plan = make_plan(torchvision.models.resnet50(num_classes=4), placement="pre")
    assert [site.channels for site in plan.sites[:5]] == [64, 256, 256, 256, 512]
    assert [site.stage for site in plan.sites] == [2] * 3 + [3] * 4 + [4] * 6 + [5] * 3


def test_a_joint_block_before_a_concatenation_is_the_papers_block_after_the_module():
    torch.manual_seed(0)
    model = nets.enliven(torchvision.models.googlenet(weights=None, init_weights=False, num_classes=4)).eval()
    joint, after = inject(model), inject(model, placement="post")
    trained = {path: block.state_dict() for path, block in blocks(joint).items()}
    for block in blocks(joint).values():
        nn.init.normal_(block.fc2.weight)
        nn.init.normal_(block.fc2.bias)
    assert list(blocks(after)) == list(trained)
    for path, block in blocks(after).items():
        block.load_state_dict(blocks(joint)[path].state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert not torch.equal(joint(x), model(x))
        torch.testing.assert_close(joint(x), after(x))  # the same operations, rounded in the same order or nearly so


def test_separate_blocks_have_the_channels_of_their_branches():
    model = nets.wrap(nets.Fire())
    separate = inject(model, concat="separate")
    assert [site.channels for site in get_plan(separate).sites] == [12, 20]
    assert [site.num_merges for site in get_plan(separate).sites] == [1, 0]
    assert_same_network(model, separate, torch.randn(2, 3, 8, 8))
    three = inject(nets.wrap(nets.SumOfThree()), concat="separate")
    assert [site.branches for site in get_plan(three).sites] == [("a",), ("b",)]


def test_before_a_split_the_untouched_half_is_not_gated():
    model = nets.wrap(nets.Shuffle(), 32)
    injected = inject(model, placement="pre")
    assert get_plan(injected).sites[0].channels == 16
    assert_same_network(model, injected, torch.randn(2, 3, 8, 8))


def test_a_fusion_is_gated_if_it_is_asked_for():
    model = nets.enliven(nets.wrap(nets.RepVgg()))
    injected = inject(model, at=["fusion"])
    (site,) = get_plan(injected).sites
    assert (site.kind, site.branches, site.channels) == ("fusion", ("dense", "point", "identity"), 48)
    assert_same_network(model, injected, torch.randn(2, 3, 8, 8))


def test_what_is_not_asked_for_is_passed_over_with_that_reason():
    model = nets.wrap(nn.Sequential(nets.Residual(), nets.Fire()))
    plan = make_plan(model, at=["concat"])
    assert [site.kind for site in plan.sites] == ["concat"]
    assert [(item.kind, item.reason) for item in plan.passed_over] == [("residual", "not asked for: at is concat")]


class Closed(nn.Module):
    """All layers of the branch stand in a child."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


def test_a_convolution_inside_of_a_child_is_gated_before_the_layer_that_reads_it():
    layers = [nets.conv(16, 8, kernel=1), nn.ReLU(), nets.conv(8, 8), nn.ReLU(), nets.conv(8, 16, kernel=1)]
    model = nets.wrap(Closed(*layers))
    injected = inject(model, placement="conv3x3")
    (site,) = get_plan(injected).sites
    assert (site.path, site.kind, site.channels, site.num_merges) == ("1.body.4.se", "residual", 8, 1)
    x = torch.randn(2, 3, 8, 8)
    assert_same_network(model, injected, x)
    assert_same_network(model, inject(model, plan=Plan.from_json(get_plan(injected).to_json())), x)


def test_a_convolution_that_ends_a_child_cannot_be_gated_from_outside():
    model = nets.wrap(Closed(nets.conv(16, 8, kernel=1), nn.ReLU(), nets.conv(8, 16)))
    with pytest.raises(EmptyPlanError, match="its convolutions stand inside of body, not in its owner's code"):
        make_plan(model, placement="conv3x3")


def test_torchvisions_mobilenet_is_gated_at_its_depthwise_convolutions():
    model = nets.enliven(torchvision.models.mobilenet_v2(num_classes=4))
    injected = inject(model, placement="conv3x3")
    assert [site.channels for site in get_plan(injected).sites][:3] == [144, 192, 192]
    assert_same_network(model, injected, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stages": [2]}, ["layer1"]),
        ({"stages": [3]}, ["layer2"]),
        ({"stages": [2, 4]}, ["layer1", "layer3"]),
        ({"skip_last_stage": True}, ["layer1", "layer2", "layer3"]),
        ({"stages": [5]}, ["layer4"]),
    ],
)
def test_stages_are_counted_by_resolution_as_the_paper_does(options, expected):
    plan = make_plan(timm.create_model("resnet18"), **options)
    assert sorted({site.owner.split(".")[0] for site in plan.sites}) == expected
    assert len(plan.sites) + sum(item.num_merges for item in plan.passed_over) == 8


def test_a_stage_without_sites_is_an_error():
    with pytest.raises(OptionError, match="stage 9 has no sites; they are in stages 2, 3, 4, 5"):
        make_plan(timm.create_model("resnet18"), stages=[9])


@pytest.mark.parametrize("options", [{"squeeze": "max"}, {"gate": "hard_sigmoid"}, {"gate": "tanh"}])
def test_other_squeezes_and_gates_are_exact_and_learn(options):
    model = nets.enliven(nets.wrap(nets.Residual()))
    injected = inject(model, **options)
    assert_same_network(model, injected, torch.randn(2, 3, 8, 8))
    (block,) = blocks(injected).values()
    assert all(getattr(block, name) == value for name, value in options.items())
    assert block.fc2.weight.grad.any()
    again = inject(model, plan=Plan.from_json(get_plan(injected).to_json()))
    assert next(iter(blocks(again).values())).extra_repr() == block.extra_repr()
