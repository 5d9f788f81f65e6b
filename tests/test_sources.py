import json
import socket
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn

from se_inject.errors import ArtifactError, SourceError
from se_inject.provenance import Source
from se_inject.sources import build_skeleton, load_weights, open_network, resolve_name
from tests import nets


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """No name can be resolved, and nothing is in a cache."""

    def fail(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.hub.set_dir(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", ("timm", "resnet50")),
        ("resnet50.a1_in1k", ("timm", "resnet50.a1_in1k")),
        ("timm:resnet50", ("timm", "resnet50")),
        ("torchvision:resnet50", ("torchvision", "resnet50")),
        ("googlenet", ("torchvision", "googlenet")),
        ("hf-hub:timm/resnet18.a1_in1k", ("timm", "hf-hub:timm/resnet18.a1_in1k")),
        ("tests.nets:UNet", ("factory", "tests.nets:UNet")),
    ],
)
def test_a_name_means_timm_first_and_then_torchvision(name, expected):
    assert resolve_name(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "neither timm nor torchvision has a network 'resnet5O'; the nearest names are resnet50"),
        ("timm:googlenett", "timm has no network 'googlenett'"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19'; the nearest names are resnet1"),
        ("qqqqqqqq", r"timm\.list_models\(\) lists the names"),
        ("model.pt", "there is no file model.pt"),
    ],
)
def test_a_wrong_name_lists_the_nearest(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message):
        resolve_name(name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.pt2", "a program, which has no layers to work on"),
        ("model.onnx", "a program, which has no layers to work on"),
        ("runs/net.bin", "no artifact of se-inject"),
    ],
)
def test_a_file_of_another_kind_is_no_name(name, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=f"^there is no file {name}$"):
        resolve_name(name)
    (tmp_path / "runs").mkdir()
    (tmp_path / name).touch()
    match = rf"^{name} is {what}; expected an artifact \(.pt, .pth, .safetensors\) or the name of a network$"
    with pytest.raises(SourceError, match=match):
        resolve_name(name)


def test_the_source_says_which_network_and_which_weights():
    network = open_network("resnet18", pretrained=False)
    assert str(network.source) == "timm:resnet18.a1_in1k"
    assert network.source.weights == "none (random)"
    assert network.source.preprocess["input_size"] == [3, 224, 224]
    assert Source.from_values(network.source.to_values()) == network.source


def test_the_source_keeps_the_classes_names():
    named = Source("timm", "resnet18", classes=("cat", "dog"))
    values = named.to_values()
    assert Source.from_values(json.loads(json.dumps(values))) == named
    del values["classes"]  # as files were before there were names
    assert Source.from_values(values) == replace(named, classes=())
    with pytest.raises(SourceError, match="does not say how its network is built"):
        Source.from_values({**values, "classes": "cat"})


@pytest.mark.parametrize("name", ["resnet50", "torchvision:resnet18", "hf-hub:timm/resnet18.a1_in1k"])
@pytest.mark.usefixtures("unreachable")
def test_without_a_network_the_message_says_what_to_do(name):
    with pytest.raises(SourceError, match=r"could not be fetched.*--weights FILE.*--no-pretrained"):
        open_network(name)


def test_without_a_network_the_hub_is_as_it_was_afterwards(unreachable):
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    with pytest.raises(SourceError):
        open_network("resnet50")
    assert before == hub.HF_HUB_OFFLINE


def test_a_wrong_tag_is_named():
    with pytest.raises(SourceError, match="timm:resnet18.bogus cannot be built: Invalid pretrained tag"):
        open_network("resnet18.bogus", pretrained=False)


def test_weights_are_loaded_from_a_file(tmp_path):
    model = timm.create_model("resnet18")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    network = open_network("resnet18", weights=tmp_path / "w.pth")
    assert all(torch.equal(v, network.model.state_dict()[k]) for k, v in model.state_dict().items())
    assert network.source.weights == str(tmp_path / "w.pth")


def test_weights_are_loaded_from_safetensors(tmp_path):
    import safetensors.torch

    model = timm.create_model("resnet18")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    network = open_network("torchvision:resnet18", weights=tmp_path / "w.safetensors")
    assert torch.equal(network.model.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "w.pth")
    with pytest.raises(SourceError, match=r"are not those of ResNet: .* unexpected \(layer1\.0\.conv3\.weight"):
        open_network("resnet18", weights=tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="there is no file"):
        open_network("resnet18", weights=tmp_path / "none.pth")


def test_a_classifier_of_another_size_points_to_the_option(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(SourceError, match=r"2 of another shape \(fc\.weight, fc\.bias\); --num-classes sets"):
        open_network("resnet18", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_the_classifier_is_replaced_and_the_rest_loaded(tmp_path, name):
    full = open_network(name, pretrained=False)
    torch.save(full.model.state_dict(), tmp_path / "w.pth")
    network = open_network(name, weights=tmp_path / "w.pth", num_classes=5)
    assert network.model(torch.randn(1, 3, 32, 32).repeat(2, 1, 1, 1)).shape == (2, 5)
    assert torch.equal(network.model.conv1.weight, full.model.conv1.weight)
    assert network.source.options["num_classes"] == 5
    same = open_network(name, pretrained=False, num_classes=5)
    torch.save(same.model.state_dict(), tmp_path / "five.pth")
    again = open_network(name, weights=tmp_path / "five.pth", num_classes=5)
    assert torch.equal(again.model.fc.weight, same.model.fc.weight)


def test_a_network_of_the_hub_is_built_again_without_it(tmp_path):
    """timm reads `local-dir:` as it reads `hf-hub:`: a configuration and the weights beside it."""
    import json

    import safetensors.torch

    from se_inject import blocks, inject, load, save

    model = timm.create_model("resnet18", num_classes=6, act_layer="silu")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    values = {"architecture": "resnet18", "num_classes": 6, "model_args": {"act_layer": "silu"}}
    config = {"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 6}
    (tmp_path / "config.json").write_text(json.dumps({**values, "pretrained_cfg": config}))
    name = f"local-dir:{tmp_path}"
    network = open_network(name)
    assert network.source.weights == name
    assert network.source.preprocess["input_size"] == [3, 96, 96]
    assert torch.equal(network.model.fc.weight, model.fc.weight)
    injected = inject(network.model).eval()
    for block in blocks(injected).values():
        nn.init.normal_(block.fc2.weight)
    save(injected, tmp_path / "injected.pt", source=network.source)
    (tmp_path / "config.json").unlink()
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(load(tmp_path / "injected.pt")(x), injected(x))


def test_num_classes_must_be_positive():
    with pytest.raises(SourceError, match="--num-classes is 0"):
        open_network("resnet18", pretrained=False, num_classes=0)


@pytest.mark.parametrize("in_chans", [0, -1])
@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18", "tests.nets:TwoBranches"])
def test_input_channels_must_be_positive(name, in_chans):
    with pytest.raises(SourceError, match=f"^--in-chans is {in_chans}, expected at least 1$"):
        open_network(name, pretrained=False, in_chans=in_chans)


def test_torchvisions_defaults_with_weights_are_used(monkeypatch):
    """With weights, torchvision builds GoogLeNet without auxiliary heads and with an input transform."""
    full = torchvision.models.get_model("googlenet", weights=None, init_weights=False)
    weights = torchvision.models.GoogLeNet_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: full.state_dict())
    network = open_network("torchvision:googlenet")
    assert network.source.weights == "GoogLeNet_Weights.IMAGENET1K_V1"
    assert network.source.preprocess["crop_size"] == 224
    skeleton = build_skeleton(network.source)
    skeleton.load_state_dict(network.model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(skeleton.eval()(x), network.model.eval()(x))
    few = open_network("torchvision:googlenet", num_classes=3)
    assert few.model.eval()(x).shape == (1, 3)
    assert torch.equal(few.model.conv1.conv.weight, full.conv1.conv.weight)


def test_a_factory_is_called_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text(
        "from torch import nn\nfrom tests.nets import TwoBranches\n\n"
        "def build(num_classes=10):\n    return TwoBranches(num_classes)\n\nready = TwoBranches(3)\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert open_network("shop:build", num_classes=4).model.head.out_features == 4
    assert open_network("shop:ready").model.head.out_features == 3
    with pytest.raises(SourceError, match="shop has no 'biuld'; the nearest are build"):
        open_network("shop:biuld")
    with pytest.raises(SourceError, match="'shopp' cannot be imported"):
        open_network("shopp:build")
    with pytest.raises(SourceError, match=r"shop:number\(\) failed: TypeError"):
        open_network("shop:number")
    with pytest.raises(SourceError, match="torch.nn:Linear.*failed: TypeError"):
        open_network("torch.nn:Linear")
    with pytest.raises(SourceError, match="gave a dict; expected a torch.nn.Module"):
        open_network("builtins:dict")


def test_unexpected_keys_are_shown():
    net = nets.Plain()
    with pytest.raises(SourceError, match=r"4 missing .*; 1 unexpected \(weight\)|missing .*unexpected"):
        load_weights(net, nn.Linear(2, 2, bias=False).state_dict(), "x.pt")
