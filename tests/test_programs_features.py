"""torchvision's feature extractors of an injected network, with its blocks as nodes."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from se_inject import SqueezeExcite, blocks, inject
from se_inject.errors import ModelError
from tests import nets
from tests.equality import assert_equal_outputs

X = (2, 3, 64, 64)
LEAVES = {"leaf_modules": [SqueezeExcite]}


def make_original(name="resnet18"):
    options = {"init_weights": False} if name == "googlenet" else {}
    return nets.enliven(torchvision.models.get_model(name, num_classes=10, **options)).eval()


@pytest.mark.parametrize("training", [False, True])
def test_features_are_those_of_the_original(training):
    original = make_original()
    nodes = {"layer1.1.bn2": "branch", "layer3": "stage", "flatten": "embedding"}
    found = []
    for model in (original, inject(original)):
        extractor = create_feature_extractor(model, nodes).train(training)
        found.append(extractor(torch.randn(X, generator=torch.Generator().manual_seed(1))))
    assert list(found[1]) == list(nodes.values())
    assert_equal_outputs(*found)


def test_a_block_is_a_node_and_gives_what_the_block_gives():
    model = inject(make_original())
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=LEAVES)
    assert [name for name in eval_nodes if name.endswith(".se")] == list(blocks(model))
    assert train_nodes == eval_nodes
    x, seen = torch.randn(X), []
    # The block's map is written over by the activation that comes next.
    model.layer4[1].se.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with torch.no_grad():
        model(x)
        for options in ({}, {"tracer_kwargs": LEAVES}):
            extractor = create_feature_extractor(model, ["layer4.1.se"], **options)
            assert torch.equal(extractor(x)["layer4.1.se"], seen[0])


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing the model in eval mode")  # of auxiliary heads
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("squeezenet1_1", {}),
        ("squeezenet1_1", {"tracer_kwargs": LEAVES}),
        ("densenet121", {}),
        ("googlenet", {}),
        ("shufflenet_v2_x0_5", {}),
    ],
)
def test_a_block_over_several_branches_can_be_followed(name, options):
    original = make_original(name)
    model = inject(original)
    last = get_graph_node_names(model, **options)[1][-1]
    x = torch.randn(X)
    with torch.no_grad():
        assert torch.equal(create_feature_extractor(model, [last], **options)(x)[last], original(x))


def test_an_extractor_is_not_injected_itself():
    extractor = create_feature_extractor(make_original(), ["layer2"])
    with pytest.raises(ModelError, match="the model is a feature extractor of torchvision's; inject first, make one"):
        inject(extractor)
