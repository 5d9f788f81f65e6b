import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from se_inject import blocks, inject, load, save, standardize
from se_inject.errors import ArtifactError, ModelError, SEInjectError
from se_inject.standard import find_standard_form
from tests import nets
from tests.equality import assert_same_network
from tests.forgery import forge
from tests.test_rewrite import IDS, NETS


def open_gates(model):
    """Move the gates and the norms away from where they start."""
    nets.enliven(model)
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight, 0, 0.5)
        if block.fc1.bias is not None:
            nn.init.normal_(block.fc1.bias)
            nn.init.normal_(block.fc2.bias)
    return model


def inject_opened(network, **options):
    return open_gates(inject(network, **options))


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


# What each network's blocks are made by, read off its code; None where a block has no standard form.
EXPECTED = {
    **{name: [{"1.bn2.weight", "1.bn2.bias"}] for name in IDS if name.startswith("Residual")},
    **{name: [{"1.bn2.weight", "1.bn2.bias"}] for name in ("Projected", "Dropped", "TrainBranch", "Optional")},
    "SumOfThree": [{"1.a.3.weight", "1.b.3.weight"}],
    "Dense": [None],
    "Fire": [{"1.expand1x1.weight", "1.expand3x3.weight"}],
    "Shuffle": [{"1.branch.3.weight"}],
    "UNet": [None, None],
    "TwoBranches": [{"left.weight", "right.weight"}, {"conv2.weight"}],
    "Split": [{"conv2.weight"}],
    "Shared": [{"block.bn2.weight", "block.bn2.bias"}],
}


@pytest.mark.parametrize(("make", "name"), list(zip(NETS, IDS, strict=True)), ids=IDS)
def test_the_standard_form_computes_the_same_to_the_bit(make, name, x):
    model = inject_opened(make())
    form = find_standard_form(model)
    expected = dict(zip(blocks(model), EXPECTED[name], strict=True))
    assert {fold.block: set(fold.parameters) for fold in form.folds} == {k: v for k, v in expected.items() if v}
    standard = standardize(model, strict=False)
    assert {path: block.gain for path, block in blocks(standard).items()} == {
        path: 1.0 if names else 2.0 for path, names in expected.items()
    }
    assert_same_network(model, standard, x)


def test_the_layer_is_doubled_w1_halved_and_nothing_else_moved():
    model = inject_opened(nets.wrap(nets.Residual()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    standard = standardize(model).state_dict()
    factors = {"1.bn2.weight": 2, "1.bn2.bias": 2, "1.se.fc1.weight": 0.5}
    assert list(standard) == list(before)
    assert all(torch.equal(standard[key], value * factors.get(key, 1)) for key, value in before.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_inplace_changes_the_given_model_and_twice_is_once(x):
    model = inject_opened(nets.wrap(nets.Residual()))
    expected = model.eval()(x)
    assert standardize(model, inplace=True) is model
    state = copy.deepcopy(model.state_dict())
    assert standardize(model, inplace=True) is model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert find_standard_form(model).folds == ()
    assert torch.equal(model(x), expected)


def test_another_gain_is_folded_too(x):
    model = inject_opened(nets.wrap(nets.Residual())).eval()
    blocks(model)["1.se"].gain = 3.0
    # Three is no power of two: each product may be rounded.
    torch.testing.assert_close(standardize(model)(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_equal(dtype, x):
    model = inject_opened(nets.wrap(nets.Residual())).to(dtype).eval()
    assert torch.equal(standardize(model)(x.to(dtype)), model(x.to(dtype)))


def test_a_trained_network_goes_on_with_the_same_function(x):
    model = open_gates(inject(nets.wrap(nets.Projected(), 16))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert_same_network(model, standardize(model), x)


class Net(nn.Module):
    """A residual block whose branch ends in the given layers."""

    def __init__(self, *layers):
        super().__init__()
        self.stem, self.head = nets.conv(3, 16), nn.Linear(16, 4)
        self.conv, self.tail = nets.conv(16, 16), nn.Sequential(*layers)

    def branch(self, x):
        return self.tail(self.conv(x))

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head((x + self.branch(x)).mean((2, 3)))


class Scaled(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return F.leaky_relu(x * self.gamma[:, None, None], 0.1)


class Normed(nn.BatchNorm2d):
    """A norm with its activation, as timm's BatchNormAct2d."""

    def forward(self, x):
        return F.relu(super().forward(x))


class _OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


class OwnSiLU(nn.Module):
    """An activation with a backward of its own, as timm's memory-efficient ones."""

    def forward(self, x):
        return _OwnFunction.apply(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


FOLDED = {
    "relu": ([nn.BatchNorm2d(16), nn.ReLU(inplace=True)], {"tail.0.weight", "tail.0.bias"}),
    "leaky relu": ([nn.LeakyReLU(0.2)], {"conv.weight"}),
    "prelu": ([nn.PReLU(16)], {"conv.weight"}),
    "pooling": ([nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Dropout(0.1)], {"conv.weight"}),
    "bias": ([nn.Conv2d(16, 16, 1)], {"tail.0.weight", "tail.0.bias"}),
    "norm without scale": ([nn.GroupNorm(4, 16), nn.Identity()], {"tail.0.weight", "tail.0.bias"}),
    "layer scale": ([nn.BatchNorm2d(16), Scaled()], {"tail.1.gamma"}),
    "a norm with activation": ([Normed(16)], {"tail.0.weight", "tail.0.bias"}),
    "timm's norm": ([timm.layers.BatchNormAct2d(16)], {"tail.0.weight", "tail.0.bias"}),
    "timm's group norm": ([timm.layers.GroupNormAct(16, num_groups=4)], {"tail.0.weight", "tail.0.bias"}),
    "a block of layers": ([nn.Sequential(nets.conv(16, 16), nn.Sequential(nn.ReLU()))], {"tail.0.0.weight"}),
    "drop path": ([timm.layers.DropPath(0.5)], {"conv.weight"}),
}


@pytest.mark.parametrize(("layers", "names"), FOLDED.values(), ids=FOLDED)
def test_a_factor_goes_through_what_commutes_with_it(layers, names, x):
    model = inject_opened(Net(*layers))
    assert [set(fold.parameters) for fold in find_standard_form(model).folds] == [names]
    assert_same_network(model, standardize(model), x)


KEPT = {
    "silu": ([nn.BatchNorm2d(16), nn.SiLU()], "is no affine layer, and a factor does not pass through it"),
    "gelu": ([nn.GELU()], "is no affine layer"),
    "an autograd function": ([nn.BatchNorm2d(16), OwnSiLU()], "calls the autograd function _OwnFunction"),
    "relu6": ([nn.ReLU6()], "is no affine layer"),
    "a norm without scale": ([nn.BatchNorm2d(16, affine=False)], "tail.0 (BatchNorm2d) has no weight"),
    "standardised weights": ([Standardised(16, 16, 1)], "is no parameter that could be scaled"),
}


@pytest.mark.parametrize(("layers", "reason"), KEPT.values(), ids=KEPT)
def test_a_block_without_standard_form_is_named_with_the_reason(layers, reason, x):
    model = inject_opened(Net(*layers))
    form = find_standard_form(model)
    assert list(form.kept) == ["se"]
    assert reason in form.kept["se"]
    with pytest.raises(SEInjectError, match="^1 of 1 blocks have no standard form .se: .*strict=False lets them") as e:
        standardize(model)
    assert isinstance(e.value, ValueError)
    assert "\n" not in str(e.value)
    standard = standardize(model, strict=False)
    assert blocks(standard)["se"].gain == 2
    assert_same_network(model, standard, x)


class Bottle(nn.Module):
    """A residual block whose middle convolution ends in an activation that a factor does not pass through."""

    def __init__(self, reader, activation=None):
        super().__init__()
        self.stem, self.head = nets.conv(3, 16), nn.Linear(16, 4)
        self.conv1, self.conv2, self.norm = nets.conv(16, 8, kernel=1), nets.conv(8, 8), nn.BatchNorm2d(8)
        self.act, self.reader = activation or nn.SiLU(), reader

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.act(self.norm(self.conv2(self.conv1(x))))
        return self.head((x + self.reader(out)).mean((2, 3)))


class ReadTwice(Bottle):
    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.act(self.norm(self.conv2(self.conv1(x))))
        return self.head((x + self.reader(out)).mean((2, 3))) + out.mean()


class ReadByFunction(Bottle):
    def __init__(self, reader):
        super().__init__(reader)
        self.weight = nn.Parameter(torch.randn(16, 8, 1, 1))

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = F.relu(self.act(self.norm(self.conv2(self.conv1(x)))))
        return self.head((x + F.conv2d(out, self.weight)).mean((2, 3)))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)

    def forward(self, *, maps):
        return self.norm(self.conv(maps))


class ReadByKeyword(Bottle):
    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.act(self.norm(self.conv2(self.conv1(x))))
        return self.head((x + self.reader(maps=out)).mean((2, 3)))


READ = {
    "convolution": (Bottle, nn.Conv2d(8, 16, 1), {"reader.weight"}),
    "transposed": (Bottle, nn.ConvTranspose2d(8, 16, 1), {"reader.weight"}),
    "relu between": (Bottle, nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 16, 1)), {"reader.2.weight"}),
    "in a child": (Bottle, timm.layers.ConvNormAct(8, 16, 1), {"reader.conv.weight"}),
    "function": (ReadByFunction, nn.Identity(), {"weight"}),
    "keyword": (ReadByKeyword, Keyword(), {"reader.conv.weight"}),
}


@pytest.mark.parametrize(("kind", "reader", "names"), READ.values(), ids=READ)
def test_the_layer_after_the_block_takes_the_gain_where_none_before_it_can(kind, reader, names, x):
    model = inject_opened(kind(reader), placement="conv3x3")
    (fold,) = find_standard_form(model).folds
    assert (set(fold.parameters), fold.is_after) == (names, True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    standard = standardize(model)
    assert all(
        torch.equal(value, before[key] * (2 if key in names else 1)) for key, value in standard.state_dict().items()
    )
    assert blocks(standard)[fold.block].gain == 1
    assert_same_network(model, standard, x)


NOT_READ = {
    "read twice": (ReadTwice, nn.Conv2d(8, 16, 1)),
    "norm first": (Bottle, nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1))),
    "silu first": (Bottle, nn.Sequential(nn.SiLU(), nn.Conv2d(8, 16, 1))),
    "standardised": (Bottle, Standardised(8, 16, 1)),
}


@pytest.mark.parametrize(("kind", "reader"), NOT_READ.values(), ids=NOT_READ)
def test_a_layer_after_the_block_that_is_not_its_only_reader_is_left_alone(kind, reader, x):
    model = inject_opened(kind(reader), placement="conv3x3")
    (reason,) = find_standard_form(model).kept.values()
    assert "is no affine layer, and a factor does not pass through it" in reason
    assert_same_network(model, standardize(model, strict=False), x)


class Twice(Net):
    """The last layer is used elsewhere too."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head((x + self.conv(x)).mean((2, 3)) + self.conv(x).amax((2, 3)))


class Tied(nn.Module):
    """Two layers have one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nets.conv(3, 16), nets.Residual(), nn.Linear(16, 4)
        self.norm = nn.BatchNorm2d(16)
        self.norm.weight = self.block.bn2.weight

    def forward(self, x):
        return self.head(self.norm(self.block(self.stem(x))).mean((2, 3)))


class Lent(nn.Module):
    """The parent runs a layer of its child once more."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nets.conv(3, 16), nets.Residual(), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block.bn2(self.block(self.stem(x))).mean((2, 3)))


class TiedByCode(Net):
    """The whole reads the weight of a layer in its part."""

    def __init__(self):
        super().__init__()
        self.block = nets.Residual()

    def forward(self, x):
        x = self.block(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3))) + self.block.bn2.weight.sum()


class Read(Net):
    """The branch's map is read beside the sum."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(16))

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.branch(x)
        return self.head((x + out).mean((2, 3)) + out.amax((2, 3)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Twice, "conv.weight is used more than once"),
        (Tied, "block.bn2.weight is shared with another layer"),
        (Lent, "block.bn2 runs 2 times where its block runs 1 times"),
        (TiedByCode, "block.bn2.weight is read by other code too"),
        (Read, "is used by `amax` too"),
    ],
)
def test_a_layer_with_another_use_is_left_alone(make, reason, x):
    model = inject_opened(make())
    (kept,) = find_standard_form(model).kept.values()
    assert reason in kept
    assert_same_network(model, standardize(model, strict=False), x)


def test_parametrized_weights_are_left_alone(x):
    model = inject(Net(nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 1))))
    assert "tail.0" in find_standard_form(model).kept["se"]
    assert_same_network(model, standardize(model, strict=False), x)


@pytest.mark.parametrize("layer", ["bn2", "se"])
def test_a_layer_with_a_hook_is_left_alone(layer, x):
    """The hook may change what the layer is handed or gives."""
    model = inject_opened(nets.wrap(nets.Residual()))
    model.get_submodule(f"1.{layer}").register_forward_hook(lambda module, args, output: output + 1)
    form = find_standard_form(model)
    assert form.folds == ()
    assert "has a hook" in form.kept["1.se"]
    assert_same_network(model, standardize(model, strict=False), x)


def test_a_layer_after_the_block_with_a_hook_is_left_alone(x):
    model = inject_opened(Bottle(nn.Conv2d(8, 16, 1)), placement="conv3x3")
    model.reader.register_forward_pre_hook(lambda module, args: args[0] + 1)
    assert find_standard_form(model).folds == ()
    assert_same_network(model, standardize(model, strict=False), x)


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_a_layer_after_the_block_that_computes_its_weight_is_left_alone(wrap):
    model = inject(Bottle(wrap(nn.Conv2d(8, 16, 1))), placement="conv3x3")
    form = find_standard_form(model)
    assert (form.folds, len(form.kept)) == ((), 1)


def test_a_graph_module_has_a_standard_form_too(x):
    model = inject_opened(fx.symbolic_trace(nets.wrap(nets.Residual())), example=x)
    assert len(find_standard_form(model).folds) == 1
    assert_same_network(model, standardize(model), x)


def test_a_tanh_gate_has_no_standard_form():
    model = inject(nets.wrap(nets.Residual()))
    blocks(model)["1.se"].gate = "tanh"
    with pytest.raises(SEInjectError, match="its gate is 'tanh', not a sigmoid"):
        standardize(model)


def test_a_model_that_was_not_injected_is_refused():
    with pytest.raises(ModelError, match="has not been injected"):
        standardize(nets.TwoBranches())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_and_pickles_keep_the_gain(tmp_path, x, suffix):
    model = standardize(inject_opened(nets.TwoBranches())).eval()
    save(model, tmp_path / f"model{suffix}")
    again = load(tmp_path / f"model{suffix}", base=nets.TwoBranches)
    assert {block.gain for block in blocks(again).values()} == {1.0}
    assert torch.equal(again(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_file_with_gains_of_other_blocks_is_refused(tmp_path):
    save(standardize(inject(nets.TwoBranches())), tmp_path / "model.pt")
    for gains in ({"none": 1.0}, {"se": "1"}, [1.0]):
        forge(tmp_path / "model.pt", lambda content: content.update(gains=gains))  # noqa: B023
        with pytest.raises(ArtifactError, match="its gains are not those of the 2 blocks"):
            load(tmp_path / "model.pt", base=nets.TwoBranches)


def test_a_network_without_a_fixed_course_is_followed_too():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights_backbone=None, num_classes=3)
    form = find_standard_form(inject(model, example=([torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)],)))
    assert form.folds or form.kept


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "num_folds", "num_kept"),
    [
        ("timm:resnet50", 16, 0),
        ("timm:convnext_atto", 12, 0),
        ("timm:efficientnet_lite0", 9, 0),
        ("timm:inception_resnet_v2", 43, 0),
        ("timm:dpn48b", 28, 4),
        ("timm:nf_resnet26", 0, 8),
        ("torchvision:densenet121", 0, 4),
        ("torchvision:googlenet", 9, 0),
        ("torchvision:shufflenet_v2_x0_5", 16, 0),
    ],
)
def test_real_networks_stay_equal(name, num_folds, num_kept):
    library, _, short = name.partition(":")
    options = {"init_weights": False} if short == "googlenet" else {}
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    model = inject_opened(make(short, **options))
    form = find_standard_form(model)
    assert (len(form.folds), len(form.kept)) == (num_folds, num_kept)
    assert_same_network(model, standardize(model, strict=False), torch.randn(2, 3, 160, 160))
