import pytest
import timm
import torch
import torchvision
from torch import nn

from se_inject import inject
from se_inject.errors import DataError
from se_inject.heads import count_outputs, replace_head
from se_inject.rewrite import blocks
from se_inject.start import read_model_format
from tests import nets

SIZE = (3, 32, 32)


def replace(model, num_outputs, num_classes=7, size=SIZE):
    """Replace, check that the rest is what it was, and give the fresh names."""
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    fresh = replace_head(model, num_outputs, num_classes)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    for name, (parameter, values) in before.items():
        assert (after[name] is parameter) != (name in fresh)
        assert name in fresh or torch.equal(after[name], values)
    assert count_outputs(model, size) == num_classes
    return fresh


@pytest.mark.parametrize(("name", "head"), [
    ("resnet18", "fc"), ("mobilenetv3_small_050", "classifier"), ("densenet121", "classifier"), ("vgg11", "head.fc"),
])  # fmt: skip
def test_timm_replaces_the_heads_of_its_networks(name, head):
    model = timm.create_model(name, num_classes=11)
    assert replace(model, 11) == {f"{head}.weight", f"{head}.bias"}
    assert model.num_classes == 7


@pytest.mark.parametrize(("name", "head"), [
    ("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"), ("squeezenet1_1", "classifier.1"),
    ("shufflenet_v2_x0_5", "fc"), ("densenet121", "classifier"),
])  # fmt: skip
def test_the_last_layer_of_torchvisions_networks_is_replaced(name, head):
    model = torchvision.models.get_model(name, num_classes=11)
    assert replace(model, 11) == {f"{head}.weight", f"{head}.bias"}


def test_the_last_layer_of_a_vgg_is_replaced():
    with torch.device("meta"):
        model = torchvision.models.vgg11(num_classes=11)
    assert replace_head(model, 11, 7) == {"classifier.6.weight", "classifier.6.bias"}
    assert model.classifier[6].weight.shape == (7, 4096)
    assert model.classifier[6].weight.is_meta


@pytest.mark.parametrize("num_outputs", [11, 128])
def test_auxiliary_heads_are_replaced_too(num_outputs):
    """Each auxiliary head of GoogLeNet begins with a 1x1 convolution of 128 outputs, which is none."""
    model = torchvision.models.googlenet(num_classes=num_outputs, aux_logits=True, init_weights=False)
    fresh = replace(model, num_outputs, size=(3, 64, 64))
    assert fresh == {f"{head}.{kind}" for head in ("fc", "aux1.fc2", "aux2.fc2") for kind in ("weight", "bias")}
    assert [out.shape[1] for out in model.train()(torch.rand(2, 3, 64, 64))] == [7, 7, 7]


def test_inceptions_auxiliary_head_is_replaced_too():
    with torch.device("meta"):
        model = torchvision.models.inception_v3(num_classes=11, aux_logits=True, init_weights=False)
    fresh = replace_head(model, 11, 7)
    assert fresh == {f"{head}.{kind}" for head in ("fc", "AuxLogits.fc") for kind in ("weight", "bias")}


def test_the_head_of_an_own_network_is_replaced():
    assert replace(nets.TwoBranches(), 10) == {"head.weight", "head.bias"}


def test_a_head_without_bias_stays_without():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
    assert replace(model, 4, size=(3, 2, 2)) == {"1.weight"}


def test_a_convolution_as_head_stays_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert replace(model, 4) == {"0.weight", "0.bias"}


def test_a_head_keeps_its_type():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    replace(model, 4, size=(3, 2, 2))
    model = timm.create_model("resnet18", num_classes=4).double()
    replace(model, 4)
    assert model.fc.weight.dtype == torch.float64


@pytest.mark.parametrize("make", [
    lambda: timm.create_model("resnet18", num_classes=11),
    lambda: torchvision.models.resnet18(num_classes=11),
    lambda: torchvision.models.squeezenet1_1(num_classes=11),
])  # fmt: skip
def test_the_head_of_an_injected_network_is_replaced(make):
    model = inject(make(), example=torch.zeros(2, *SIZE))
    paths = list(blocks(model))
    fresh = replace(model, 11)
    assert len(fresh) == 2
    assert list(blocks(model)) == paths


def test_the_layers_of_blocks_are_no_heads():
    """The block of `TwoBranches` stands after its head, and has a layer of as many outputs."""
    model = inject(nets.TwoBranches(num_classes=16), example=torch.zeros(2, *SIZE))
    assert replace(model, 16) == {"head.weight", "head.bias"}


def test_a_network_without_such_a_layer_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(DataError, match="Sequential has no linear layer of 4 outputs to replace; give it the number"):
        replace_head(model, 4, 7)


def test_the_outputs_are_counted_and_the_modes_kept():
    model = nn.Sequential(nets.wrap(nets.Residual(), num_classes=5), nn.Dropout())
    model[0].eval()
    assert count_outputs(model, (3, 8, 8)) == 5
    assert model.training
    assert not model[0].training


def test_a_size_that_a_network_does_not_take_is_an_error():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    match = r"Sequential does not run on images \(3, 8, 8\): mat1 and mat2 .*; --input-size and --in-chans say others"
    with pytest.raises(DataError, match=match):
        count_outputs(model, (3, 8, 8))


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 1), torch.nn.LSTM(8, 4)])
def test_a_network_that_gives_no_scores_is_an_error(model):
    with pytest.raises(DataError, match=r"gives no scores \(N, classes\); fine-tuning is for class|does not run on"):
        count_outputs(model, (3, 8, 8))


def test_the_channels_are_those_of_the_injection_and_not_of_the_layer_defined_first():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem, self.body = nn.Conv2d(16, 10, 1), nets.conv(1, 16), nets.Residual(16)

        def forward(self, x):
            return self.head(self.body(self.stem(x)).mean((2, 3), keepdim=True)).flatten(1)

    model = inject(HeadFirst(), example=torch.zeros(2, 1, 32, 32))
    assert read_model_format(model, None, None).size == (1, 32, 32)
