import pytest
import timm
import torch
from torch import nn

from se_inject import blocks, freeze_backbone, inject, param_groups
from se_inject.errors import ModelError
from se_inject.groups import freeze_batch_norm
from tests import nets


@pytest.fixture
def model():
    return inject(nets.wrap(nets.Residual()))


def name_groups(model, **options):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, lr=0.1, se_lr=1.0, weight_decay=0.5, **options)
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}, groups


def test_blocks_and_backbone_are_apart_and_vectors_do_not_decay(model):
    found, groups = name_groups(model)
    assert found["blocks"] == {"1.se.fc1.weight", "1.se.fc2.weight"}
    assert found["blocks, no decay"] == {"1.se.fc1.bias", "1.se.fc2.bias"}
    assert "1.bn1.weight" in found["backbone, no decay"]
    assert "1.conv1.weight" in found["backbone"]
    assert {(g["name"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("backbone", 0.1, 0.5),
        ("backbone, no decay", 0.1, 0.0),
        ("blocks", 1.0, 0.5),
        ("blocks, no decay", 1.0, 0.0),
    }


def test_every_parameter_is_in_one_group(model):
    groups = param_groups(model, lr=0.1, se_lr=1.0)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_what_is_fresh_has_a_rate_of_its_own(model):
    name = "1.conv2.weight"
    found, groups = name_groups(model, fresh=[name], fresh_lr=3.0)
    assert found["fresh"] == {name}
    assert next(g for g in groups if g["name"] == "fresh")["lr"] == 3.0


def test_what_the_network_exempts_does_not_decay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def no_weight_decay(self):
            return {"fc.weight"}

    found, _ = name_groups(Net())
    assert found == {"backbone, no decay": {"fc.weight", "fc.bias"}}


def test_any_optimizer_takes_them(model):
    torch.optim.AdamW(param_groups(model, lr=0.1, se_lr=1.0))


def test_a_frozen_backbone_neither_learns_nor_counts():
    model = freeze_backbone(inject(nets.enliven(timm.create_model("resnet18", num_classes=3))).train())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 90112
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, se_lr=1.0), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith(tuple(f"{path}." for path in blocks(model))) for key in changed)
    assert all(block.training for block in blocks(model).values())


def test_batch_norms_go_on_after_train_until_they_are_frozen_again(model):
    freeze_backbone(model).train()
    assert model[1].bn1.training
    freeze_batch_norm(model)
    assert not model[1].bn1.training


def test_a_network_without_blocks_cannot_be_frozen_around_them():
    with pytest.raises(ModelError, match="has not been injected"):
        freeze_backbone(nets.Residual())
