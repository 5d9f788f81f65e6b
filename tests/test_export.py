import json

import pytest
import timm
import torch
import torchvision
from torch import nn

from se_inject import blocks, inject, save, standardize
from se_inject.counterpart import find_gate_layers, propose_options
from se_inject.errors import ExampleError, ExportError, ModelError, SEInjectError, SourceError
from se_inject.export import export_to_timm
from tests.test_cli import failure, run  # noqa: F401


def train(model, num_steps=4, size=64):
    """Train on noise, until gates and batch norms are not what they were."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images = torch.randn(4, 3, size, size)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model.train()(images).square().mean().backward()
        optimizer.step()
    gates = []
    hooks = [
        block.register_forward_hook(lambda block, maps, out: gates.append(block.compute_gate(*maps)))
        for block in blocks(model).values()
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    assert max((gate - 1).abs().max() for gate in gates) > 0.01
    assert all((buffer != 0).any() for name, buffer in model.named_buffers() if name.endswith("running_mean"))
    return model


def assert_close(model, target, size=96):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, theirs = model.eval()(images), target.eval()(images)
    # Relative to the largest output; the two networks may add in another order.
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


SMALL = [("timm:resnet18", "seresnet18"), ("torchvision:resnet18", "seresnet18"), ("timm:nf_resnet26", "nf_seresnet26")]
MIDDLE = [
    ("timm:resnext26ts", "seresnext26ts", {"r": 16}),
    ("timm:regnetx_002", "regnety_002", None),
]
LARGE = [
    ("timm:resnet34", "seresnet34"),
    ("timm:resnet50", "seresnet50"),
    ("torchvision:resnet50", "seresnet50"),
    ("timm:resnet101", "seresnet101"),
    ("timm:resnext50_32x4d", "seresnext50_32x4d"),
    ("timm:resnetaa50d", "seresnetaa50d"),
]


@pytest.mark.parametrize(("plain", "name"), [*SMALL, *(pytest.param(*pair, marks=pytest.mark.zoo) for pair in LARGE)])
def test_a_trained_network_becomes_timms_own(plain, name):
    library, _, short = plain.partition(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    model = train(inject(make(short, num_classes=7), r=16))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export = export_to_timm(model, name)
    assert export.difference <= 1e-5
    assert export.options == {"num_classes": 7}
    assert type(export.model) is type(timm.create_model(name))
    assert not blocks(export.model)
    assert_close(model, export.model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.zoo
@pytest.mark.parametrize(("plain", "name", "options"), MIDDLE)
def test_a_network_with_blocks_after_the_middle_convolutions_becomes_timms_own(plain, name, options):
    options = options or propose_options(find_gate_layers(timm.create_model(name).state_dict()))
    model = inject(timm.create_model(plain.removeprefix("timm:")), placement="conv3x3", **options)
    export = export_to_timm(train(model), name)
    assert export.difference <= 1e-5
    assert_close(model, export.model)


def test_a_standard_network_and_grey_images_are_taken_too():
    model = standardize(inject(timm.create_model("resnet18", num_classes=3, in_chans=1)))
    export = export_to_timm(model, "timm:seresnet18", example=torch.randn(1, 1, 64, 64))
    assert export.options == {"num_classes": 3, "in_chans": 1}


def test_types_follow_the_weights():
    model = inject(timm.create_model("resnet18", num_classes=3)).bfloat16()
    export = export_to_timm(model, "seresnet18", example=torch.randn(1, 3, 64, 64))
    assert export.model.fc.weight.dtype is torch.bfloat16


def test_without_a_classifier():
    model = inject(timm.create_model("resnet18", num_classes=0))
    assert export_to_timm(model, "seresnet18", example=torch.randn(1, 3, 64, 64)).options == {"num_classes": 0}


class Renamed(nn.Module):
    """A ResNet-18 under names of its own."""

    def __init__(self, num_classes=3):
        super().__init__()
        net = timm.create_model("resnet18", num_classes=num_classes)
        self.stem, self.norm = net.conv1, net.bn1
        self.stages = nn.Sequential(net.layer1, net.layer2, net.layer3, net.layer4)
        self.head = net.fc

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.stages(x).mean((2, 3)))


def test_names_of_ones_own_map_by_order():
    model = train(inject(Renamed(), r=16, example=torch.zeros(2, 3, 64, 64)))
    export = export_to_timm(model, "seresnet18")
    assert export.options == {"num_classes": 3}
    assert_close(model, export.model)


class Stretched(Renamed):
    """The same tensors, but not the same network."""

    def forward(self, x):
        return super().forward(x.abs())


WRONG = [
    ({}, "resnet18", ExportError, "resnet18 has no squeeze-and-excitation block of two layers"),
    ({}, "seresnet81", SourceError, "timm has no network 'seresnet81'; the nearest names are seresnet"),
    (
        {},
        "seresnet34",
        ExportError,
        "seresnet34 is not ResNet with blocks added, tensors differ: 96 only in seresnet34",
    ),
    ({}, "seresnet50", ExportError, r"of another shape .layer1.0.conv1.weight 64x64x3x3 against 64x64x1x1"),
    (
        {"r": 4},
        "seresnet18",
        ExportError,
        "se is 64 -> 16 -> 64 with biases, .* 64 -> 8 -> 64 .*r=16, divisor=8, bias=True",
    ),
    ({"bias": False}, "seresnet18", ExportError, "64 -> 8 -> 64 without biases, that of .* with biases; inject with"),
    ({"exclude": ["layer4.*"]}, "seresnet18", ExportError, "was injected with 6 blocks, seresnet18 has 8"),
]


@pytest.mark.parametrize(("options", "name", "kind", "message"), WRONG)
def test_a_wrong_pair_gets_one_line(options, name, kind, message):
    model = inject(timm.create_model("resnet18"), **options)
    with pytest.raises(kind, match=message) as error:
        export_to_timm(model, name)
    assert "\n" not in str(error.value)


def test_blocks_elsewhere_are_not_taken_for_the_same():
    with pytest.raises(ExportError, match="64 -> 8 -> 64 with biases, that of sedarknet21 32 -> 8 .* stands elsewhere"):
        export_to_timm(inject(timm.create_model("darknet21")), "sedarknet21")


@pytest.mark.parametrize("plain", ["resnetblur18", "stretched"])
def test_the_same_tensors_with_another_use_are_noticed(plain):
    network = Stretched() if plain == "stretched" else timm.create_model(plain)
    with pytest.raises(ExportError, match="but does something else with them: outputs differ by [0-9.e+-]+ of"):
        export_to_timm(inject(network), "seresnet18", example=torch.randn(1, 3, 64, 64))


def test_a_model_that_was_not_injected_is_refused():
    with pytest.raises(ModelError, match="has not been injected"):
        export_to_timm(timm.create_model("resnet18"), "seresnet18")


def test_several_inputs_need_an_example():
    class Two(Renamed):
        def forward(self, x, y):
            return super().forward(x) + y

    model = inject(Two(), example=(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3)))
    with pytest.raises(ExampleError, match="give example="):
        export_to_timm(model, "seresnet18")


def test_se_modules_are_found_by_their_form():
    gates = find_gate_layers(timm.create_model("seresnet50").state_dict())
    assert len(gates) == 16
    assert gates[0].keys == [f"layer1.0.se.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    legacy = find_gate_layers(timm.create_model("legacy_seresnet18").state_dict())
    assert [gate.path for gate in legacy][:2] == ["layer1.0.se_module", "layer1.1.se_module"]
    assert find_gate_layers(timm.create_model("resnet18").state_dict()) == []
    assert find_gate_layers(timm.create_model("ecaresnet50t").state_dict()) == []


@pytest.mark.parametrize("options", [{"r": 16, "divisor": 8}, {"r": 4, "divisor": 8}, {"r": 16, "divisor": 1}])
@pytest.mark.parametrize("bias", [True, False])
def test_the_options_are_found_from_the_sizes(options, bias):
    model = inject(torchvision.models.resnet18(), bias=bias, **options)
    assert propose_options(find_gate_layers(model.state_dict())) == {**options, "bias": bias}


def test_sizes_that_no_ratio_gives_are_given_by_path():
    sizes = {"layer1.*": 3, "layer2.*": 5, "layer3.*": 7, "layer4.*": 11}
    model = inject(torchvision.models.resnet18(), r=sizes, divisor=1)
    found = propose_options(find_gate_layers(model.state_dict()))
    again = inject(torchvision.models.resnet18(), **found)
    assert [b.fc1.out_channels for b in blocks(again).values()] == [b.fc1.out_channels for b in blocks(model).values()]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_command_writes_what_timm_loads(run, suffix):  # noqa: F811
    model = train(inject(timm.create_model("resnet18", num_classes=5), r=16))
    save(model, "model.pt")
    code, out, _ = run("export", "model.pt", "--to", "timm:seresnet18", "--out", f"se{suffix}")
    assert code == 0
    call = f"timm.create_model('seresnet18', num_classes=5, checkpoint_path='se{suffix}')"
    assert out.startswith(f"se{suffix}: {call}; outputs differ by ")
    assert_close(model, timm.create_model("seresnet18", num_classes=5, checkpoint_path=f"se{suffix}"))


def test_the_command_names_the_file_itself_and_speaks_json(run, tmp_path):  # noqa: F811
    save(inject(timm.create_model("resnet18")), "model.pt")
    code, out, _ = run("export", "model.pt", "--to", "timm:seresnet18", "--json")
    values = json.loads(out)
    assert code == 0
    assert values.pop("difference") <= 1e-5
    assert values == {"out": "seresnet18.pt", "to": "timm:seresnet18", "options": {}}
    assert (tmp_path / "seresnet18.pt").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "onnx"], "--to is 'onnx'; expected timm:NAME"),
        (["--to", "timm:"], "--to is 'timm:'; expected timm:NAME"),
        (["--to", "timm:seresnet5O"], "the nearest names are seresnet50"),
        (["--to", "timm:seresnet50"], "seresnet50 is not ResNet with blocks added"),
        (["--to", "timm:seresnet18", "--out", "a.bin"], "expected one of .pt, .pth, .safetensors"),
    ],
)
def test_bad_input_of_the_command_gets_one_line(run, tmp_path, args, message):  # noqa: F811
    save(inject(timm.create_model("resnet18")), "model.pt")
    assert message in failure(run("export", "model.pt", *args))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_the_command_wants_an_injected_network(run):  # noqa: F811
    assert "has not been injected" in failure(run("export", "resnet18", "--to", "timm:seresnet18"))


def test_export_errors_are_errors_of_ours():
    assert issubclass(ExportError, SEInjectError)
    assert issubclass(ExportError, ValueError)
