import json

import pytest
import timm
import torch
import torchvision
from torch import nn

from se_inject import blocks, inject, load, make_plan, save, save_adapter
from se_inject.artifact import read_artifact
from se_inject.errors import ArtifactError, ModelError, SourceError
from se_inject.provenance import Source
from se_inject.sources import open_network
from tests import nets
from tests.forgery import forge


def trained(model):
    injected = inject(model).eval()
    for block in blocks(injected).values():
        nn.init.normal_(block.fc2.weight)
    return injected


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_network_of_timm_is_saved_and_loaded(tmp_path, x, suffix):
    model = trained(timm.create_model("resnet18", num_classes=7, in_chans=3))
    save(model, tmp_path / f"model{suffix}")
    values, _ = read_artifact(tmp_path / f"model{suffix}")
    assert values["source"]["weights"] == "not recorded"  # it may have any
    again = load(tmp_path / f"model{suffix}")
    assert not again.training
    assert torch.equal(model(x), again(x))
    assert list(again.state_dict()) == list(model.state_dict())
    save(again, tmp_path / f"twice{suffix}")
    assert torch.equal(load(tmp_path / f"twice{suffix}")(x), model(x))


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:googlenet",
        "torchvision:shufflenet_v2_x0_5",
        "timm:densenet121",
        "timm:mambaout_femto",
        "timm:vovnet39a",
    ],
)
def test_a_network_of_a_name_is_saved_and_loaded(tmp_path, name):
    x = torch.randn(1, 3, 96, 96)
    network = open_network(name, pretrained=False, num_classes=4)
    model = trained(network.model)
    save(model, tmp_path / "model.pt", source=network.source)
    assert torch.equal(load(tmp_path / "model.pt")(x), model(x))


def test_a_network_of_ones_own_needs_its_base(tmp_path, x):
    net = nets.UNet()
    model = trained(net)
    save(model, tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"does not say how its network is built; give load\(\.\.\., base=\)"):
        load(tmp_path / "model.pt")
    for base in (nets.UNet(), nets.UNet):
        assert torch.equal(load(tmp_path / "model.pt", base=base)(x), model(x))
    base = nets.UNet()
    load(tmp_path / "model.pt", base=base)
    assert not blocks(base)


def test_a_timm_network_that_timm_would_build_otherwise_needs_its_base(tmp_path):
    changed = timm.create_model("resnet18")
    changed.layer1[0].act1 = nn.SiLU()
    save(trained(changed), tmp_path / "model.pt")
    with pytest.raises(SourceError, match="give load"):
        load(tmp_path / "model.pt")


def test_the_plan_is_replayed_with_its_options(tmp_path):
    model = inject(timm.create_model("resnet18"), r={"layer4.*": 4}, bias=False, exclude=["layer1.*"])
    save(model, tmp_path / "model.pt")
    again = load(tmp_path / "model.pt")
    assert {p: (b.r, b.fc1.bias, b.fc1.out_channels) for p, b in blocks(again).items()} == {
        p: (b.r, b.fc1.bias, b.fc1.out_channels) for p, b in blocks(model).items()
    }


def test_half_precision_comes_back_as_it_was(tmp_path, x):
    model = trained(timm.create_model("resnet18")).to(torch.bfloat16)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again(x.bfloat16()), model(x.bfloat16()))


def test_wrappers_are_seen_through(tmp_path, x):
    model = trained(timm.create_model("resnet18"))
    save(nn.DataParallel(model), tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt")(x), model(x))


def test_a_child_called_module_is_no_wrapper(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nets.TwoBranches()

        def forward(self, x):
            return self.module(x)

    model = trained(Holder())
    save(model, tmp_path / "model.pt")
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(load(tmp_path / "model.pt", base=Holder)(x), model(x))


def test_a_classifier_that_was_reset_is_written_down(tmp_path, x):
    model = trained(timm.create_model("resnet18"))
    model.reset_classifier(4)
    save(model, tmp_path / "model.pt")
    again = load(tmp_path / "model.pt")
    assert torch.equal(again(x), model(x))
    again.reset_classifier(9)
    save(again, tmp_path / "again.pt")
    assert torch.equal(load(tmp_path / "again.pt")(x), again(x))


def test_what_was_not_injected_is_not_saved(tmp_path):
    with pytest.raises(ModelError, match="has not been injected"):
        save(nets.UNet(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("write", "name"), [(save, "model.pt"), (save_adapter, "adapter.safetensors")])
def test_a_network_that_lost_a_block_is_not_saved(write, name, tmp_path):
    model = trained(timm.create_model("resnet18"))
    model.layer2[1].se = nn.Identity()
    with pytest.raises(ModelError, match=r"layer2\.1\.se was a block and is now of class Identity"):
        write(model, tmp_path / name)
    del model.layer2[1].se
    with pytest.raises(ModelError, match=r"layer2\.1\.se was a block and is gone"):
        write(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_file_is_read_without_executing_anything(tmp_path):
    save(trained(timm.create_model("resnet18")), tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(content) == {"format", "version", "digest", "source", "plan", "state_dict"}
    assert content["source"]["name"] == "resnet18.a1_in1k"


def change(path, **values):
    forge(path, lambda content: content.update(values))


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    save(trained(timm.create_model("resnet18")), tmp_path / "model.pt")
    change(tmp_path / "model.pt", version=3)
    with pytest.raises(ArtifactError, match="format version 3, this se-inject reads up to 2: upgrade"):
        load(tmp_path / "model.pt")


def test_a_state_dict_is_no_artifact(tmp_path):
    torch.save(nets.UNet().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="no artifact of se-inject; a state dict is given with --weights"):
        load(tmp_path / "model.pt")


def test_a_file_for_another_architecture_is_an_error(tmp_path):
    save(trained(timm.create_model("resnet18")), tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="is of another network: the plan does not fit ResNet"):
        load(tmp_path / "model.pt", base=timm.create_model("resnet50"))
    with pytest.raises(ArtifactError, match="is of another network: 2 tensors differ in name, .*fc.weight"):
        load(tmp_path / "model.pt", base=timm.create_model("resnet18", num_classes=3))


@pytest.mark.parametrize(
    "source",
    [
        {"library": "timm"},
        {"library": "shell", "name": "rm", "options": {}, "weights": "", "preprocess": {}},
        "timm:resnet18",
        [],
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path, source):
    save(trained(timm.create_model("resnet18")), tmp_path / "model.pt")
    change(tmp_path / "model.pt", source=source)
    with pytest.raises(SourceError, match="does not say how its network is built"):
        load(tmp_path / "model.pt")


def test_a_factory_is_not_imported_unless_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\nfrom tests.nets import UNet\n"
    )
    monkeypatch.chdir(tmp_path)
    model = trained(nets.UNet())
    save(model, "model.pt", source=Source("factory", "mynets:UNet"))
    with pytest.raises(SourceError, match="which is code: give load.*trust_source=True"):
        load("model.pt")
    assert not (tmp_path / "imported").exists()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(load("model.pt", trust_source=True)(x), model(x))
    assert torch.equal(load("model.pt", base=nets.UNet)(x), model(x))


def test_a_plan_in_a_file_cannot_reach_outside_the_network(tmp_path):
    save(trained(timm.create_model("resnet18")), tmp_path / "model.pt")
    plan = torch.load(tmp_path / "model.pt", weights_only=True)["plan"]
    for key, value in (("name", "__class__"), ("method", "__init__"), ("owner", "__dict__"), ("name", "x\ny")):
        broken = json.loads(json.dumps(plan))
        broken["sites"][0][key] = value
        change(tmp_path / "model.pt", plan=broken)
        with pytest.raises(ArtifactError, match="is of another network"):
            load(tmp_path / "model.pt")


def test_a_torchvision_model_made_in_python_can_name_its_source(tmp_path, x):
    model = trained(torchvision.models.resnet18(num_classes=3))
    save(model, tmp_path / "model.pt", source=Source("torchvision", "resnet18", {"num_classes": 3}))
    assert torch.equal(load(tmp_path / "model.pt")(x), model(x))


def test_the_plan_of_a_loaded_network_is_the_plan(tmp_path):
    plan = make_plan(timm.create_model("resnet18"))
    save(inject(timm.create_model("resnet18"), plan=plan), tmp_path / "model.pt")
    from se_inject.rewrite import get_plan

    assert get_plan(load(tmp_path / "model.pt")) == plan


def test_versions_of_layers_are_kept(tmp_path):
    """torchvision's MNASNet asks its state dict for the version that it was written with."""

    class Versioned(nets.TwoBranches):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            assert local_metadata.get("version") == 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    save(inject(Versioned()), tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", base=Versioned)
