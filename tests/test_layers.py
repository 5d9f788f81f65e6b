"""Networks without merges: blocks at their layers."""

import inspect
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from se_inject import Plan, blocks, inject, load, make_plan, save
from se_inject.rewrite import get_plan
from tests import nets
from tests.equality import assert_same_network


def build_mobilenet_v1():
    """A MobileNet v1 as people write it: one Sequential of depthwise and pointwise convolutions."""

    def separable(inp, out, stride):
        depthwise = nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False)
        pointwise = nets.conv(inp, out, kernel=1)
        return [depthwise, nn.BatchNorm2d(inp), nn.ReLU(), pointwise, nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *(nets.conv(3, 16, 2), nn.BatchNorm2d(16), nn.ReLU()),
        *separable(16, 32, 1),
        *separable(32, 64, 2),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)),
    )


class Functional(nn.Module):
    """Pooling as functions, in the root."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nets.conv(3, 16), nets.conv(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


class Audio(nn.Sequential):
    """Strided convolutions over a signal."""

    def __init__(self):
        super().__init__(
            *(nn.Conv1d(1, 16, 9, 2, 4), nn.ReLU(), nn.Conv1d(16, 32, 9, 2, 4), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4)),
        )


class Hourglass(nn.Module):
    """Goes down, up and down again."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nets.conv(8 if i else 3, 8) for i in range(4))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.convs[0](x)), 2)
        x = F.interpolate(F.relu(self.convs[1](x)), scale_factor=2)
        x = F.max_pool2d(F.relu(self.convs[2](x)), 2)
        return self.convs[3](x)


class InTurn(nn.Module):
    """Runs its children in turn, as timm's RegStage does."""

    def __init__(self):
        super().__init__()
        self.down, self.conv = nets.conv(8, 8, stride=2), nets.conv(8, 8)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


# network, kind, paths of the blocks, shape
CASES = {
    "vgg11_bn": (
        lambda: timm.create_model("vgg11_bn", num_classes=4),
        "stage",
        [f"features.{i}.se" for i in (3, 7, 14, 21, 28)],
        (2, 3, 64, 64),
    ),
    "alexnet": (
        lambda: torchvision.models.alexnet(num_classes=4),
        "stage",
        [f"features.{i}.se" for i in (2, 5, 12)],
        (2, 3, 96, 96),
    ),
    "mobilenet_v1": (build_mobilenet_v1, "depthwise", ["6.se", "12.se"], (2, 3, 32, 32)),
    "functional": (Functional, "stage", ["se", "se2"], (2, 3, 32, 32)),
    "audio": (Audio, "stage", ["2.se", "4.se"], (2, 1, 256)),
    "in_turn": (
        lambda: nn.Sequential(nets.conv(3, 8), InTurn(), InTurn()),
        "stage",
        ["1.down.se", "2.down.se"],
        (2, 3, 32, 32),
    ),
    "hourglass": (Hourglass, "stage", ["se", "se2"], (2, 3, 32, 32)),
    "repvgg": (
        lambda: timm.create_model("repvgg_a0", num_classes=4),
        "stage",
        [*(f"stages.{i}.0.se" for i in range(4)), "head.se"],
        (2, 3, 64, 64),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_network_without_merges_gets_blocks_by_itself_and_the_plan_says_so(name, tmp_path):
    build, kind, paths, shape = CASES[name]
    model = nets.enliven(build())
    x = torch.randn(shape)
    injected = inject(model, example=x)
    plan = get_plan(injected)
    assert list(blocks(injected)) == paths
    assert {site.kind for site in plan.sites} == {kind}
    assert f"({kind})" in plan.note
    assert plan.note in str(plan)
    assert_same_network(model, injected, x)
    for path, block in blocks(injected).items():
        assert block.fc2.weight.grad.any(), path
    assert [key for key in injected.state_dict() if key in model.state_dict()] == list(model.state_dict())
    pickle.loads(pickle.dumps(injected))
    save(injected, tmp_path / "model.pt")
    assert_same_network(model, load(tmp_path / "model.pt", base=model), x)
    again = inject(model, plan=Plan.from_json(plan.to_json()))
    assert_same_network(model, again, x)


@pytest.mark.parametrize("name", ["in_turn", "regnetx_002"])
def test_no_block_runs_as_a_child_of_its_owner_once_more(name):
    model = CASES[name][0]() if name in CASES else timm.create_model(name, num_classes=4)
    injected, seen = inject(model, at=["stage"], example=torch.zeros(2, 3, 32, 32)), []
    for path, block in blocks(injected).items():
        block.register_forward_pre_hook(lambda *_, path=path: seen.append(path))
    injected.eval()(torch.zeros(2, 3, 32, 32))
    assert sorted(seen) == sorted(blocks(injected))


def test_a_layer_that_is_gated_keeps_its_class_its_place_and_its_neighbours():
    model = torchvision.models.vgg11(num_classes=4)
    injected = inject(model)
    assert type(injected.features) is nn.Sequential
    assert len(injected.features) == len(model.features)
    assert isinstance(injected.features[2], nn.MaxPool2d)
    assert "return super().forward(self.se(input))" in inspect.getsource(type(injected.features[2]))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(injected.features[:11](x), model.features[:11](x))


@pytest.mark.parametrize(("kind", "num_blocks"), [("conv", 20), ("depthwise", 0), ("stage", 5)])
def test_layers_of_a_residual_network_can_be_asked_for(kind, num_blocks):
    model = nets.enliven(timm.create_model("resnet18", num_classes=4))
    if not num_blocks:
        with pytest.raises(ValueError, match="no layer for depthwise ran"):
            make_plan(model, at=[kind])
        return
    injected = inject(model, at=[kind])
    plan = get_plan(injected)
    assert len(plan.sites) == num_blocks
    assert sum(item.num_merges for item in plan.passed_over) == 8
    assert_same_network(model, injected, torch.randn(2, 3, 64, 64))


def test_a_stage_of_a_residual_network_ends_where_the_next_begins():
    plan = make_plan(timm.create_model("resnet18", num_classes=4), at=["stage"])
    owners = ["maxpool", "layer2.0", "layer3.0", "layer4.0", "global_pool"]
    assert [site.owner for site in plan.sites] == owners
    assert [site.channels for site in plan.sites] == [64, 64, 128, 256, 512]


def test_merges_and_layers_can_be_asked_for_together():
    model = timm.create_model("mobilenetv2_100", num_classes=4)
    injected = inject(model, at=["residual", "depthwise"])
    kinds = [site.kind for site in get_plan(injected).sites]
    assert (kinds.count("residual"), kinds.count("depthwise")) == (10, 17)
    assert_same_network(model, injected, torch.randn(2, 3, 64, 64))


def test_a_plain_network_that_already_has_attention_is_not_given_more_by_itself():
    with pytest.raises(ValueError, match="already carries channel attention"):
        make_plan(timm.create_model("seresnet18"))


def test_a_shared_pooling_has_one_block_for_maps_of_one_width_and_is_passed_over_otherwise():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.pool = nets.conv(3, 16), nets.conv(16, 32), nn.MaxPool2d(2)
            self.conv3 = nets.conv(32, 32, 2)

        def forward(self, x):
            return self.conv3(F.relu(self.pool(self.conv2(self.pool(self.conv1(x))))))

    plan = make_plan(Reused(), example=torch.zeros(2, 3, 32, 32))
    assert [site.path for site in plan.sites] == ["conv3.se"]
    assert "called with different arguments" in plan.passed_over[0].reason
