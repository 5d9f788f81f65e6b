"""Adapters: the blocks alone, put onto copies of the network that they were tuned for."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from se_inject import (
    blocks,
    disable_adapters,
    eject,
    inject,
    list_adapters,
    load,
    load_adapter,
    save,
    save_adapter,
    set_adapter,
)
from se_inject.adapters import compute_fingerprint, read_adapter
from se_inject.errors import ArtifactError, ModelError, OptionError
from tests import nets
from tests.forgery import forge
from tests.test_cli import run  # noqa: F401


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, zero_init_last=False).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def tune(network, seed=0, **options):
    model = inject(network, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in blocks(model).values():
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@torch.no_grad()
def test_an_adapter_goes_onto_a_copy_of_the_network(network, x, tmp_path, suffix):
    model = tune(network)
    save_adapter(model, tmp_path / f"birds{suffix}")
    save(model, tmp_path / "whole.pt")
    assert (tmp_path / f"birds{suffix}").stat().st_size < 0.1 * (tmp_path / "whole.pt").stat().st_size
    again = load_adapter(copy.deepcopy(network), tmp_path / f"birds{suffix}")
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again(x), network(x))
    assert not blocks(network)
    assert list(list_adapters(again)) == ["default"]


@torch.no_grad()
def test_adapters_of_other_plans_switch_at_run_time(network, x, tmp_path):
    models = {"a": tune(network), "b": tune(network, 1), "c": tune(network, 2, r=8, exclude=["layer1.*"])}
    adapted = copy.deepcopy(network)
    for name, model in models.items():
        save_adapter(model, tmp_path / f"{name}.pt")
        adapted = load_adapter(adapted, tmp_path / f"{name}.pt", name=name, inplace=True)
        assert torch.equal(adapted(x), model(x))
    for name in "acbca":
        set_adapter(adapted, name)
        assert torch.equal(adapted(x), models[name](x))
        assert list(blocks(adapted)) == list(blocks(models[name]))
    assert list(list_adapters(adapted)) == ["a", "b", "c"]
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        set_adapter(other, "c")
        assert torch.equal(other(x), models["c"](x))
        assert torch.equal(adapted(x), models["a"](x))
    with pytest.raises(OptionError, match="there is no adapter 'd'; the network has 'a', 'b', 'c'"):
        set_adapter(adapted, "d")


@pytest.mark.parametrize(
    "make", [nets.Residual, nets.ResidualInPlace, nets.ResidualTorchAdd, nets.TwoBranches, nets.UNet]
)
@torch.no_grad()
def test_without_adapters_the_outputs_are_the_originals(make):
    torch.manual_seed(0)
    network = make().eval()
    model = tune(network)
    x = torch.randn(2, 16 if issubclass(make, nets.Residual) else 3, 32, 32)
    expected, tuned = network(x.clone()), model(x.clone())
    with disable_adapters(model):
        assert torch.equal(model(x.clone()), expected)
    assert torch.equal(model(x.clone()), tuned)


def test_without_adapters_training_is_the_originals_too(network, x):
    plain, model = copy.deepcopy(network).train(), tune(network).train()
    plain(x).sum().backward()
    with disable_adapters(model):
        model(x).sum().backward()
    assert torch.equal(plain.bn1.running_mean, model.bn1.running_mean)
    assert torch.allclose(plain.conv1.weight.grad, model.conv1.weight.grad)


ATTENTIONS = [
    (nets.Residual, {"block": "eca"}),
    (nets.Residual, {"block": "cbam"}),
    (nets.Fire, {"concat": "separate"}),
    (nets.Fire, {"concat": "joint"}),
    (nets.Fire, {"block": "ese"}),
]


@pytest.mark.parametrize(("make", "options"), ATTENTIONS)
@torch.no_grad()
def test_every_kind_of_block_is_disabled(make, options):
    torch.manual_seed(0)
    network = make().eval()
    model = tune(network, **options)
    x = torch.randn(2, 16, 32, 32)
    expected, tuned = network(x.clone()), model(x.clone())
    assert not torch.equal(expected, tuned)
    with disable_adapters(model):
        assert torch.equal(model(x.clone()), expected)
    assert torch.equal(model(x.clone()), tuned)


@torch.no_grad()
def test_what_is_written_without_adapters_holds_them(network, x, tmp_path):
    model = tune(network)
    keys = list(model.state_dict())
    with disable_adapters(model):
        assert list(model.state_dict()) == keys
        save(model, tmp_path / "whole.pt")
        save_adapter(model, tmp_path / "a.pt")
    assert torch.equal(load_adapter(network, tmp_path / "a.pt")(x), model(x))
    assert torch.equal(load(tmp_path / "whole.pt")(x), model(x))


@torch.no_grad()
def test_copies_that_are_made_without_adapters_have_them(network, x):
    model = tune(network)
    with disable_adapters(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert torch.equal(eject(model)(x), network(x))
    assert all(torch.equal(made(x), model(x)) for made in copies)
    for made in copies:
        with disable_adapters(made):
            assert torch.equal(made(x), network(x))
        assert torch.equal(made(x), model(x))


@torch.no_grad()
def test_disabled_adapters_are_not_changed(network, x, tmp_path):
    save_adapter(tune(network), tmp_path / "a.pt")
    save_adapter(tune(network, 1, r=8), tmp_path / "b.pt")
    model = load_adapter(load_adapter(network, tmp_path / "a.pt", name="a"), tmp_path / "b.pt", name="b")
    expected = model(x)
    with disable_adapters(model):
        for change in (
            lambda: set_adapter(model, "a"),
            lambda: load_adapter(model, tmp_path / "a.pt", name="c", inplace=True),
        ):
            with pytest.raises(ModelError, match="the blocks of ResNet are disabled; leave disable_adapters, then"):
                change()
        other = load_adapter(model, tmp_path / "a.pt", name="c")
        assert torch.equal(model(x), network(x))
    assert torch.equal(model(x), expected)
    assert torch.equal(other(x), tune(network)(x))
    set_adapter(model, "a")
    assert torch.equal(model(x), other(x))


@torch.no_grad()
def test_blocks_that_are_ejected_while_disabled_stay_out(network, x):
    model = tune(network)
    with disable_adapters(model):
        eject(model, inplace=True)
    assert not blocks(model)
    assert list(model.state_dict()) == list(network.state_dict())
    assert torch.equal(model(x), network(x))


@torch.no_grad()
def test_contexts_nest_and_end_at_an_error(network, x):
    model = tune(network)
    expected = model(x)
    vars(model.layer1[0].se)["forward"] = model.layer1[0].se.forward  # as accelerate's hooks do
    before = [dict(vars(block)) for block in blocks(model).values()]
    with disable_adapters(model):
        with pytest.raises(KeyError), disable_adapters(model):
            raise KeyError
        assert torch.equal(model(x), network(x))
    assert torch.equal(model(x), expected)
    assert [dict(vars(block)) for block in blocks(model).values()] == before
    outer, inner = disable_adapters(model), disable_adapters(model)
    for context in (outer, inner):
        context.__enter__()
    for context in (outer, inner):  # in the wrong order
        context.__exit__(None, None, None)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_compiled_network_is_disabled_too(network, x):
    model = tune(network)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
        with disable_adapters(model):
            assert torch.equal(compiled(x), network(x))


def test_the_digest_is_of_the_network_alone(network):
    digest = compute_fingerprint(network)
    assert compute_fingerprint(tune(network)) == digest
    assert compute_fingerprint(copy.deepcopy(network).to(memory_format=torch.channels_last)) == digest
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.conv1.weight[0, 0, 0, 0] += 1e-3
    assert compute_fingerprint(other) != digest
    assert compute_fingerprint(copy.deepcopy(network).half()) != digest
    other = copy.deepcopy(network)
    other.bn1.running_mean += 1
    assert compute_fingerprint(other) != digest


def test_another_base_is_refused_unless_it_is_wanted(network, x, tmp_path):
    save_adapter(tune(network), tmp_path / "a.pt")
    other = copy.deepcopy(network)
    nn.init.normal_(other.fc.weight)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(
        ArtifactError, match="a.pt was made for a ResNet with other weights than this ResNet has"
    ) as error:
        load_adapter(other, tmp_path / "a.pt", inplace=True)
    assert error.value.__notes__ == ["load_adapter(..., strict=False) takes others"]
    assert list(other.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert len(blocks(load_adapter(other, tmp_path / "a.pt", strict=False))) == 8
    with pytest.raises(ArtifactError, match="a.pt is of another network: the plan does not fit"):
        load_adapter(nets.TwoBranches(), tmp_path / "a.pt", strict=False)
    with pytest.raises(ModelError, match="ResNet has blocks of its own; load an adapter onto the network without them"):
        load_adapter(inject(network), tmp_path / "a.pt")


def test_eject_forgets_the_adapters(network, tmp_path):
    save_adapter(tune(network), tmp_path / "a.pt")
    model = load_adapter(network, tmp_path / "a.pt")
    plain = eject(model)
    assert not list_adapters(plain)
    assert sorted(vars(plain)) == sorted(vars(network))


def test_blocks_of_a_factory_are_not_written(network, tmp_path):
    class Scale(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))

    model = inject(network, block=Scale)
    with pytest.raises(ModelError, match="the blocks were made by .*Scale, which no file may name"):
        save_adapter(model, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    model = inject(network, block="eca")
    save_adapter(model, tmp_path / "a.pt")
    assert list(blocks(load_adapter(network, tmp_path / "a.pt"))) == list(blocks(model))


def test_gains_are_kept(network, x, tmp_path):
    model = tune(network)
    for block in blocks(model).values():
        block.gain = 1.5
    save_adapter(model, tmp_path / "a.pt")
    with torch.no_grad():
        assert torch.equal(load_adapter(network, tmp_path / "a.pt")(x), model(x))


@pytest.mark.parametrize(("change", "match"), [
    (lambda v: v.update(format="se-inject"), "is no adapter of se-inject; a whole network is read by load"),
    (lambda v: v.update(version=3), "has format version 3, this se-inject reads up to 2: upgrade it"),
    (lambda v: v.update(version="1"), "has format version of type str, this"),
    (lambda v: v.pop("base"), "is no whole adapter"),
    (lambda v: v.update(base=7), "is no whole adapter"),
    (lambda v: v.pop("digest"), "is damaged, or was changed"),
    (lambda v: v.update(gains={"layer1.0.se": "2"}), "is no whole adapter"),
    (lambda v: v.update(gains={"fc": 2.0}), "its tensors are not those of the 8 blocks of its plan"),
    (lambda v: v["state_dict"].pop("layer1.0.se.fc1.weight"), "its blocks would have 90,112 parameters, and it holds"),
    (lambda v: v["state_dict"].update({"layer1.0.se": v["state_dict"].pop("layer1.0.se.fc1.weight")}),
     "its tensors are not those of the 8 blocks of its plan"),
    (lambda v: v["state_dict"].update({"fc.weight": torch.zeros(5, 512)}), r"of its plan \(fc.weight\)"),
    (lambda v: v["state_dict"].update({"layer1.0.se.fc1.bias": torch.zeros(9)}), "layer1.0.se.fc1.bias"),
    (lambda v: v["plan"].update(version=9), "the plan has version 9"),
    (lambda v: v.update(plan=None), "not a plan of se-inject"),
])  # fmt: skip
def test_a_damaged_adapter_changes_nothing(network, tmp_path, change, match):
    path = tmp_path / "a.pt"
    save_adapter(tune(network), path)
    forge(path, change)
    target = copy.deepcopy(network)
    with pytest.raises((ArtifactError, ValueError), match=match):
        load_adapter(target, path, inplace=True)
    assert not blocks(target)
    assert list(target.state_dict()) == list(network.state_dict())


def test_what_is_no_adapter_is_refused(network, tmp_path):
    with pytest.raises(ArtifactError, match="there is no file"):
        read_adapter(tmp_path / "none.pt")
    save(inject(network), tmp_path / "whole.pt")
    with pytest.raises(ArtifactError, match="whole.pt is no adapter of se-inject; a whole network is read by load"):
        load_adapter(network, tmp_path / "whole.pt")
    save_adapter(inject(network), tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="is no artifact of se-inject"):
        load(tmp_path / "a.pt")
    with pytest.raises(ModelError, match="has not been injected"):
        save_adapter(network, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_the_command_line_writes_and_takes_adapters(run, network):  # noqa: F811
    torch.save(network.state_dict(), "weights.pt")
    model = tune(network)
    save(model, "tuned.pt")
    code, out, _ = run("export", "tuned.pt", "--to", "adapter", "--out", "birds.safetensors")
    assert code == 0
    assert out == (
        "birds.safetensors: the 8 blocks of ResNet, 90,112 parameters; give it as --adapter birds.safetensors with the "
        "network that they were tuned on\n"
    )
    code, out, _ = run("export", "tuned.pt", "--to", "adapter", "--out", "birds.pt", "--json")
    assert json.loads(out)["parameters"] == 90112
    base = ("resnet18", "--weights", "weights.pt", "--num-classes", 5)
    code, _, err = run("export", *base, "--adapter", "birds.safetensors", "--to", "adapter", "--out", "again.pt")
    assert code == 0, err
    first, again = read_adapter("birds.safetensors"), read_adapter("again.pt")
    assert first.plan == again.plan
    assert all(torch.equal(value, again.state[key]) for key, value in first.state.items())
    code, out, err = run("plan", "resnet18", "--num-classes", 5, "--no-pretrained", "--adapter", "birds.safetensors")
    assert code == 1
    assert err.endswith("with other weights than this ResNet has; give it the original's weights\n")
    code, _, err = run("export", "tuned.pt", "--to", "adapter", "--optimize")
    assert code == 1
    assert "--to writes the blocks alone, and --optimize has no part in it" in err
    assert not Path("adapter.safetensors").exists()
