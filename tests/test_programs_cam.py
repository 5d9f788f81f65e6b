"""Class activation maps: hooks on a layer see what they saw before the injection."""

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, LayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from se_inject import blocks, inject
from tests import nets


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    original = nets.enliven(timm.create_model("resnet18", num_classes=10)).eval()
    return original, inject(original)


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def compute_map(kind, model, layer, x):
    """Explain the likeliest classes."""
    with kind(model=model, target_layers=[model.get_submodule(layer)]) as explainer:
        return explainer(input_tensor=x, targets=None)


def test_forward_and_backward_hooks_on_a_stage_see_the_same(pair, x):
    seen = []
    for model in pair:
        handles = [
            model.layer4.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone())),
            model.layer4.register_full_backward_hook(lambda module, inner, outer: seen.extend([*inner, *outer])),
            model.layer4[1].register_full_backward_hook(lambda module, inner, outer: seen.extend([*inner, *outer])),
        ]
        model.zero_grad()
        model(x)[:, 3].sum().backward()
        for handle in handles:
            handle.remove()
    assert len(seen) == 10
    for before, after in zip(seen[:5], seen[5:], strict=True):
        assert before.any()
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", [GradCAM, GradCAMPlusPlus, LayerCAM, EigenCAM])
@pytest.mark.parametrize("layer", ["layer4", "layer3.1"])
def test_maps_are_those_of_the_original(pair, x, kind, layer):
    original, injected = pair
    expected = compute_map(kind, original, layer, x)
    assert expected.shape == (2, 64, 64)
    assert expected.any()
    assert np.array_equal(compute_map(kind, injected, layer, x), expected)


def test_a_block_is_a_layer_whose_map_can_be_shown(x):
    model = inject(nets.enliven(timm.create_model("resnet18", num_classes=10))).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    targets = [ClassifierOutputTarget(1)] * 2
    with GradCAM(model=model, target_layers=[model.layer4[1].se]) as explainer:
        assert explainer(input_tensor=x, targets=targets).shape == (2, 64, 64)
