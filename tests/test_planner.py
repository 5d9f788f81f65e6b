import json

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from se_inject import Plan, inject, make_plan
from se_inject.errors import EmptyPlanError, ModelError, OptionError, PlanError
from tests import nets


@pytest.fixture(scope="module")
def resnet18():
    return timm.create_model("resnet18")


def hidden(plan):
    return {site.owner: site.hidden for site in plan.sites}


def test_a_site_says_where_what_and_how_much(resnet18):
    plan = make_plan(resnet18, r=16)
    site = plan.sites[2]
    assert (site.path, site.kind, site.merge, site.branches) == ("layer2.0.se", "residual", "x += shortcut", ("bn2",))
    assert (site.channels, site.hidden, site.num_parameters) == (128, 8, 2184)
    assert plan.num_parameters == 90112


def test_planning_changes_nothing(resnet18):
    before = {key: value.clone() for key, value in resnet18.state_dict().items()}
    classes = [type(module) for module in resnet18.modules()]
    attributes = [set(vars(module)) for module in resnet18.modules()]
    make_plan(resnet18)
    assert [type(module) for module in resnet18.modules()] == classes
    assert [set(vars(module)) for module in resnet18.modules()] == attributes
    assert all(torch.equal(value, before[key]) for key, value in resnet18.state_dict().items())


def test_a_plan_goes_through_json(resnet18):
    plan = make_plan(resnet18, r={"layer4.*": 32}, bias=False)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "sites": [{"x": 1}], "passed_over": []}', "[" * 5000]
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match="not a plan of se-inject"):
        Plan.from_json(text)


def test_a_newer_plan_asks_for_an_upgrade(resnet18):
    values = json.loads(make_plan(resnet18).to_json())
    with pytest.raises(PlanError, match="version 99, this se-inject reads up to 1: upgrade"):
        Plan.from_json(json.dumps({**values, "version": 99}))


def test_the_text_lists_sites_and_reasons():
    text = str(make_plan(nets.wrap(nets.Dense())))
    assert "1.se: concat `torch.cat(features, 1)` gating layers.0 .. layers.2 (3 maps) (24 -> 8 -> 24)" in text
    assert "passed over 2 concat: it joins a list" in text


def test_the_plan_does_not_depend_on_who_asks_for_it():
    """In its frame the first variable is a module, too, and it asks for `training`."""
    model = timm.create_model("resnet18")

    def prepare(model):
        return make_plan(model) if model.training else None

    assert prepare(model).to_json() == make_plan(model).to_json()


def test_ratios_can_differ_by_pattern(resnet18):
    plan = make_plan(resnet18, r={"*": 8, "layer4.*": 32, "layer4.1": 4})
    assert hidden(plan)["layer1.0"] == 8
    assert hidden(plan)["layer3.0"] == 32
    assert hidden(plan)["layer4.0"] == 16
    assert hidden(plan)["layer4.1"] == 128


def test_where_no_pattern_matches_the_ratio_is_16(resnet18):
    assert hidden(make_plan(resnet18, r={"layer1.*": 2}))["layer4.0"] == 32


def test_divisor_one_gives_the_papers_figure(resnet18):
    assert hidden(make_plan(resnet18, divisor=1))["layer1.0"] == 4


def test_include_and_exclude_choose_by_path(resnet18):
    plan = make_plan(resnet18, include=["layer[34].*"], exclude=["layer4.1"])
    assert [site.owner for site in plan.sites] == ["layer3.0", "layer3.1", "layer4.0"]
    reasons = {item.owner: item.reason for item in plan.passed_over}
    assert reasons["layer4.1"] == "excluded by 'layer4.1'"
    assert reasons["layer1.0"] == "not included by 'layer[34].*'"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(resnet18, option):
    with pytest.raises(OptionError, match=r"'layer9\.\*' matches none of the 8 sites \(layer1\.0, layer1\.1"):
        make_plan(resnet18, **{option: ["layer9.*"]})


def test_a_ratio_pattern_that_matches_nothing_is_an_error(resnet18):
    with pytest.raises(OptionError, match="matches none"):
        make_plan(resnet18, r={"stage4.*": 32})


@pytest.mark.parametrize("r", [0, 0.5, -1, float("nan"), "16", True, {"layer1.*": 0}])
def test_a_ratio_below_one_is_an_error(resnet18, r):
    with pytest.raises(OptionError, match="the reduction ratio must be a number of at least 1"):
        make_plan(resnet18, r=r)


def test_a_ratio_above_the_channels_is_an_error(resnet18):
    with pytest.raises(OptionError, match="r is 513, but the widest of its sites has 512 channels; give a smaller r"):
        make_plan(resnet18, r=513)
    with pytest.raises(OptionError, match="r is 65, but the widest of its sites has 64 channels"):
        make_plan(resnet18, r={"layer1.*": 65})


def test_a_ratio_above_the_channels_of_some_sites_leaves_them_one_multiple_of_the_divisor(resnet18):
    assert hidden(make_plan(resnet18, r=128))["layer1.0"] == 8


def test_other_options_out_of_range_are_errors(resnet18):
    with pytest.raises(OptionError, match="divisor is 0"):
        make_plan(resnet18, divisor=0)
    with pytest.raises(OptionError, match="placement is 'front'"):
        make_plan(resnet18, placement="front")


def test_a_network_without_any_place_is_an_error():
    flat = nn.Sequential(nets.conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 28 * 28, 4))
    with pytest.raises(EmptyPlanError, match="Sequential has no place for a block: no residual addition"):
        make_plan(flat, example=torch.zeros(2, 3, 28, 28))


def test_a_transformer_is_an_error():
    with pytest.raises(EmptyPlanError, match="24 x residual: its branch holds no convolution"):
        make_plan(torchvision.models.vit_b_16(num_classes=4))
    with pytest.raises(EmptyPlanError, match="its branch holds no convolution"):
        make_plan(timm.create_model("swin_tiny_patch4_window7_224"))


def test_where_every_merge_is_passed_over_the_reasons_are_listed():
    with pytest.raises(EmptyPlanError, match="1 x residual: its branch already carries channel attention"):
        make_plan(nets.wrap(nets.Attentive()))


def test_an_injected_network_is_refused(resnet18):
    with pytest.raises(ModelError, match=r"is injected already \(layer1\.0\)"):
        make_plan(inject(resnet18))


def test_what_ran_but_could_not_be_followed_is_passed_over_with_the_reason():
    odd = type("Odd", (nets.ShapeCondition,), {"forward": lambda self, x: x + self.branch(x) if len(x) > 1 else x})
    plan = make_plan(nn.Sequential(nets.wrap(nets.Residual())[0], nets.Residual(), odd()))
    assert [site.owner for site in plan.sites] == ["1"]
    assert [(item.owner, item.reason, item.num_merges) for item in plan.passed_over] == [
        ("2", "its code depends on the size or type of its input", 1)
    ]


def test_an_owner_with_different_calls_is_passed_over():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.other = nets.conv(3, 16), nets.Optional(), nets.Residual()

        def forward(self, x):
            x = self.stem(x)
            return self.other(self.block(self.block(x), x))

    plan = make_plan(Twice())
    assert [site.owner for site in plan.sites] == ["other"]
    assert plan.passed_over[0].reason == "its owner is called with different arguments at different times"


def test_a_shared_block_is_one_site_that_stands_for_two_sums():
    plan = make_plan(nets.Shared())
    assert [(site.path, site.num_merges) for site in plan.sites] == [("block.se", 2)]


def test_a_plan_with_a_divisor_of_zero_is_refused(resnet18):
    values = {**json.loads(make_plan(resnet18).to_json()), "divisor": 0}
    with pytest.raises(PlanError, match="a divisor beyond 1 to 4096"):
        inject(resnet18, plan=Plan.from_json(json.dumps(values)))


def test_a_plan_for_another_network_is_refused(resnet18):
    other = make_plan(timm.create_model("resnet26"))
    with pytest.raises(
        PlanError, match="does not fit ResNet at layer1.0: it says residual of 256 channels, found residual of 64"
    ):
        inject(resnet18, plan=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"owner": "layer9.0"}, "does not fit"),
        ({"index": 7}, "number 7, found 2 places"),
        ({"kind": "concat"}, "it says concat"),
        ({"name": "conv1"}, "no room for an attribute 'conv1'"),
        ({"name": "a b"}, "no room for an attribute 'a b'"),
        ({"hidden": 3}, "3 hidden channels are not what r=16 gives"),
        ({"r": 0.0}, "hidden channels are not what r=0 gives"),
        ({"r": "16"}, "not a plan of se-inject: .*Site.r is '16'"),
        ({"index": "0"}, "not a plan of se-inject: .*Site.index is '0'"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused_before_anything_changes(resnet18, change, message):
    values = json.loads(make_plan(resnet18).to_json())
    values["sites"][0] |= change
    keys = list(resnet18.state_dict())
    with pytest.raises(PlanError, match=message):
        inject(resnet18, plan=Plan.from_json(json.dumps(values)), inplace=True)
    assert list(resnet18.state_dict()) == keys
    assert {type(m).__name__ for m in resnet18.modules() if "SE" in type(m).__name__} == set()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_mode_does_not_matter(mode):
    net = nets.wrap(nets.Residual())
    expected = make_plan(net)
    with mode():
        plan = make_plan(net)
    assert plan.sites == expected.sites
    assert plan.passed_over == expected.passed_over


def test_a_method_of_its_own_may_ask_for_the_mode():
    class Asking(nets.Split):
        def forward_features(self, x):
            return F.dropout(self.stem(x), 0.1, self.training)

        def forward(self, x):
            x = self.forward_features(x)
            return self.forward_head(x + self.conv2(F.relu(self.conv1(x))))

    plan = make_plan(Asking())
    assert [site.kind for site in plan.sites] == ["residual"]
    assert not plan.passed_over


def test_what_one_block_gates_gets_no_second_one():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nets.conv(3, 16), nets.conv(3, 16), nets.conv(32, 8)

        def forward(self, x):
            x = torch.cat([self.left(x), self.right(x)], 1)
            return self.head(F.max_pool2d(x, 2))

    plan = make_plan(Joined(), placement="post", at=["concat", "stage"], example=torch.zeros(2, 3, 8, 8))
    assert [site.kind for site in plan.sites] == ["concat"]
    assert [item.reason for item in plan.passed_over] == ["what it would gate is gated by the block of another place"]


def test_a_scaled_branch_that_two_sums_read_is_gated_once():
    class Twice(nets.Residual):
        def forward(self, x):
            out = self.branch(x) * 0.5
            return F.relu(x + out), F.gelu(x) + out

    plan = make_plan(Twice(), example=torch.zeros(2, 16, 8, 8))
    assert len(plan.sites) == 1
    assert [item.reason for item in plan.passed_over] == ["what it would gate is gated by the block of another place"]


def test_arguments_that_are_joined_as_they_are_enter_no_branch():
    class Joined(nn.Module):
        def forward(self, x, *others):
            return torch.cat([x, F.relu(others[0])], 1)

    class Net(nets.Residual):
        def __init__(self):
            super().__init__()
            self.joined = Joined()

        def forward(self, x):
            return self.joined(x + self.branch(x), x)

    plan = make_plan(Net(), placement="pre", example=torch.zeros(2, 16, 8, 8))
    assert [item.reason for item in plan.passed_over] == [
        "one map must enter its branches for placement pre, found none"
    ]
