"""The networks that people have: timm's and torchvision's, without weights, at small sizes."""

import pytest
import timm
import torch
import torchvision

from se_inject import blocks, inject, make_plan
from se_inject.rewrite import get_plan
from tests import nets
from tests.equality import assert_same_network
from tests.oracle import count_merges

pytestmark = pytest.mark.zoo

# name, number of blocks, image size
TIMM = [
    ("resnet18", 8, 64),
    ("resnet50", 16, 64),
    ("resnext50_32x4d", 16, 64),
    ("wide_resnet50_2", 16, 64),
    ("inception_v3", 15, 96),
    ("inception_resnet_v2", 43, 96),
    ("densenet121", 4, 64),
    ("mobilenetv2_100", 10, 64),
    ("tf_efficientnet_lite0", 9, 64),
    ("convnext_tiny", 18, 64),
    ("regnetx_002", 13, 64),
    ("dla34", 12, 64),
]
TORCHVISION = [
    ("resnet18", 8, 64),
    ("resnet50", 16, 64),
    ("resnext50_32x4d", 16, 64),
    ("wide_resnet50_2", 16, 64),
    ("inception_v3", 15, 299),  # its auxiliary head needs the size
    ("googlenet", 9, 96),
    ("densenet121", 4, 64),
    ("squeezenet1_1", 8, 64),
    ("shufflenet_v2_x1_0", 16, 64),
    ("mobilenet_v2", 10, 64),
    ("convnext_tiny", 18, 64),
    ("regnet_x_400mf", 22, 64),
]


def build_timm(name):
    return timm.create_model(name, num_classes=10)


def build_torchvision(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


CASES = [
    *(pytest.param(build_timm, *case, id=f"timm-{case[0]}") for case in TIMM),
    *(pytest.param(build_torchvision, *case, id=f"torchvision-{case[0]}") for case in TORCHVISION),
]


@pytest.mark.parametrize(("build", "name", "num_blocks", "size"), CASES)
def test_it_is_the_same_to_the_bit_and_every_merge_is_accounted_for(build, name, num_blocks, size):
    model = nets.enliven(build(name))
    x = torch.randn(2, 3, size, size)
    injected = inject(model, r=16)
    plan = get_plan(injected)
    assert len(blocks(injected)) == len(plan.sites) == num_blocks
    assert type(injected) is type(model)
    assert [key for key in injected.state_dict() if key in model.state_dict()] == list(model.state_dict())
    accounted = sum(item.num_merges for item in (*plan.sites, *plan.passed_over))
    assert accounted == count_merges(model, x)
    assert_same_network(model, injected, x)
    for path, block in blocks(injected).items():
        assert block.fc2.weight.grad.any(), path


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "regnetx_002", "tf_efficientnet_lite0"])
def test_with_drop_path_and_dropout_too(name):
    model = timm.create_model(name, num_classes=10, drop_rate=0.2, drop_path_rate=0.3)
    assert_same_network(model, inject(model), torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_tiny", "tf_efficientnet_lite0"])
def test_after_two_steps_every_parameter_of_a_block_has_moved(name):
    model = inject(nets.enliven(timm.create_model(name, num_classes=10))).train()
    before = {f"{path}.{n}": p.detach().clone() for path, b in blocks(model).items() for n, p in b.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 64, 64)), torch.arange(8)).backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    for key, value in before.items():
        assert parameters[key].grad.any(), key
        assert not torch.equal(parameters[key], value), key


def test_the_block_stands_before_drop_path():
    import inspect

    model = inject(timm.create_model("resnet18", drop_path_rate=0.1))
    source = inspect.getsource(type(model.layer2[1]))
    assert source.index("self.se(") < source.index("self.drop_path(") < source.index("out += x")


def test_a_network_that_has_attention_in_every_block_says_so():
    from se_inject.errors import EmptyPlanError

    for name in ("seresnet18", "efficientnet_b0", "ecaresnet26t", "mobilenetv3_small_100"):
        model = timm.create_model(name)
        try:
            reasons = {item.reason for item in make_plan(model).passed_over}
        except EmptyPlanError as error:
            reasons = {str(error)}
        assert any("already carries channel attention" in reason for reason in reasons), name


def test_a_unet_and_a_net_with_all_in_its_root():
    for model, num_blocks in ((nets.UNet(), 2), (nets.TwoBranches(), 2)):
        x = torch.randn(2, 3, 32, 32)
        injected = inject(model)
        plan = get_plan(injected)
        assert len(blocks(injected)) == num_blocks
        assert sum(item.num_merges for item in (*plan.sites, *plan.passed_over)) == count_merges(model, x)
        assert_same_network(model, injected, x)
