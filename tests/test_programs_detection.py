"""torchvision's detection networks take an injected backbone, or are injected as a whole."""

import copy

import pytest
import torch
import torchvision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor

from se_inject import blocks, inject
from tests import nets
from tests.equality import assert_equal_outputs

TARGETS = [
    {"boxes": torch.tensor([[4.0, 6.0, 40.0, 44.0]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[10.0, 8.0, 50.0, 60.0], [1.0, 2.0, 30.0, 30.0]]), "labels": torch.tensor([2, 1])},
]


def make_images():
    return [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]


def extract_by_torchvision(body):
    return _resnet_fpn_extractor(body, trainable_layers=5)


def extract_by_hand(body):
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(body, layers, in_channels_list=[128, 256, 512], out_channels=64)


def make_detector(body, extract):
    torch.manual_seed(3)  # the same pyramid and heads each time
    backbone = extract(body)
    options = {} if extract is extract_by_torchvision else {"rpn_anchor_generator": make_anchors()}
    sizes = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
    return FasterRCNN(backbone, num_classes=3, box_score_thresh=0.0, box_detections_per_img=10, **sizes, **options)


def make_anchors():
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(sizes=((16,), (32,), (48,), (64,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4)


@pytest.mark.parametrize("extract", [extract_by_torchvision, extract_by_hand])
@pytest.mark.parametrize("is_first", [True, False], ids=["backbone", "whole"])
def test_a_detector_finds_the_same_and_its_blocks_learn(extract, is_first):
    body = nets.enliven(torchvision.models.resnet18())
    original = make_detector(copy.deepcopy(body), extract)
    model = make_detector(inject(body), extract) if is_first else inject(original)
    expected = [f"backbone.body.layer{i}.{j}.se" for i in range(1, 5) for j in range(2)]
    assert [path for path in blocks(model) if path.startswith("backbone.body.")] == expected
    images = make_images()
    with torch.no_grad():
        expected, found = original.eval()(images), model.eval()(images)
    assert [len(image["boxes"]) for image in found] == [10, 10]
    assert_equal_outputs(expected, found)

    losses = []
    for net in (original, model):
        torch.manual_seed(0)  # which boxes are looked at is drawn
        losses.append(net.train()(images, TARGETS))
    assert_equal_outputs(*losses)
    assert all(loss.isfinite() for loss in losses[1].values())
    sum(losses[1].values()).backward()
    for path, block in blocks(model).items():
        assert block.fc2.weight.grad.isfinite().all(), path
        assert block.fc2.weight.grad.any(), path

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        again = model.eval()(images)
    assert not torch.equal(again[0]["scores"], found[0]["scores"])
