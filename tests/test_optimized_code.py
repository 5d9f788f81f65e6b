"""Whatever the code of a network does beside running its layers: `optimize` goes by it, or leaves them as they are."""

import copy
import io
from types import SimpleNamespace

import onnx
import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

from se_inject import (
    blocks,
    disable_adapters,
    eject,
    inject,
    load,
    load_adapter,
    optimize,
    save,
    save_adapter,
    set_adapter,
)
from se_inject.errors import ModelError
from se_inject.fused import FusedSqueezeExcite
from tests.test_optimization import train_a_little

X = (2, 3, 16, 16)


def conv(inp, out, size=1):
    return nn.Conv2d(inp, out, size, padding=size // 2)


class Aliased(nn.Module):
    """Layers by their own names and in a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(3, 8, 3), nn.BatchNorm2d(8)
        self.stem = nn.Sequential(self.conv, self.bn, nn.ReLU())

    def forward(self, x):
        return self.stem(x)


class Encoder(nn.Module):
    """As many a U-Net takes the layers of a ResNet."""

    def __init__(self):
        super().__init__()
        self.base = torchvision.models.resnet18(num_classes=2)
        children = list(self.base.children())
        self.layer0, self.layer1 = nn.Sequential(*children[:3]), nn.Sequential(*children[3:5])

    def forward(self, x):
        x = self.layer0(x)
        return x, self.layer1(x)


class Listed(nn.Module):
    """Layers in plain lists, registered one by one."""

    def __init__(self):
        super().__init__()
        self.convs, self.bns = [], []
        for i in range(2):
            self.convs.append(conv(3 if i == 0 else 8, 8, 3))
            self.bns.append(nn.BatchNorm2d(8))
            self.add_module(f"conv{i}", self.convs[i])
            self.add_module(f"bn{i}", self.bns[i])

    def forward(self, x):
        for layer, norm in zip(self.convs, self.bns, strict=True):
            x = norm(layer(x)).relu()
        return x


class AliasedOwner(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv3, self.bn = conv(3, 16), conv(16, 4), conv(4, 16), nn.BatchNorm2d(16)
        self.branch = nn.Sequential(self.conv1, nn.ReLU(), self.conv3, self.bn)

    def forward(self, x):
        x = self.stem(x)
        return torch.relu(x + self.branch(x))


class AsksForNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 8, 3), nn.BatchNorm2d(8), conv(8, 8, 3)])
        self.other = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = x.relu()
        return self.other(x)


class GathersAfterNorms(AsksForNorms):
    def forward(self, x):
        gathered = []
        for layer in self.layers:
            x = layer(x)
            if type(layer).__name__ == "BatchNorm2d":
                gathered.append(x)
        return gathered, self.other(x)


class Layers(nn.Module):
    """A convolution and its norm, run in several ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(3, 8, 3), nn.BatchNorm2d(8)


class SkipsFromNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 3, 3)])

    def forward(self, x):
        skip = x
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                skip = x
        return x + skip


class AsksForWeights(Layers):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * 2 if getattr(self.bn, "weight", None) is not None else y * 3


class CountsNorms(Layers):
    def forward(self, x):
        return self.bn(self.conv(x)) * sum(isinstance(m, nn.BatchNorm2d) for m in self.modules())


class GivesAnObject(Layers):
    def forward(self, x):
        y = self.conv(x)
        return SimpleNamespace(a=self.bn(y), b=y)


class GivesNumbers(Layers):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y), torch.tensor(y.tolist())


class Detects(nn.Module):
    """As many outputs as there are places above a threshold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        scores = self.body(x).sigmoid().amax(1).flatten()
        return scores[torch.nonzero(scores > 0.6).flatten()] + 0 * torch.rand(1)


class Keeping(nn.Module):
    def __init__(self, store=None):
        super().__init__()
        self.conv, self.store = conv(16, 16, 3), store

    def forward(self, x):
        y = self.conv(x)
        if self.store is None:
            self.features = y
        else:
            self.store.items["features"] = y
        return y


class Around(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return torch.relu(x + self.branch(x))


class Kept(nn.Module):
    """A branch whose last layer's map is looked at afterwards."""

    def __init__(self, store=None):
        super().__init__()
        self.stem, self.res = conv(3, 16, 3), Around(Keeping(store))

    def forward(self, x):
        y = self.res(self.stem(x))
        branch = self.res.branch
        return y, branch.features if branch.store is None else branch.store.items["features"]


class KeepsForItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        self.features = self.conv(x)
        return self.bn(self.features).relu()


class Returned(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = kind()

    def forward(self, x):
        return self.net(x), self.net.features


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(3, 8, 3), nn.BatchNorm2d(8)
        self.act = torch.jit.script(nn.Sequential(nn.Sigmoid(), nn.Tanh()))

    def forward(self, x):
        y = self.conv(x)
        return torch.relu(self.bn(y)) + self.act(y)


class UsedElsewhere(nn.Module):
    """A branch that runs in a method that users call, too, and which has no blocks."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.head = conv(3, 16, 3), conv(16, 4)
        self.reduce, self.expand = conv(16, width, 3), conv(width, 16)

    def encode(self, x):
        return self._add(self.stem(x))

    def _add(self, x):
        return torch.relu(x + self.expand(self.reduce(x)))

    def forward(self, x):
        return self.head(self.encode(x))


class Pooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(16, 16)

    def forward(self, x):
        return self.conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.pool = conv(3, 16, 3), conv(16, 16), Pooling()

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([self.a(x), self.pool(x)], 1)


def assert_same(model, fast, *, shapes=(X, (3, 3, 20, 12))):
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def count_norms(model):
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def prepare(model):
    """Give a network values as training does, and run it once."""
    model = train_a_little(model)
    with torch.no_grad():
        model(torch.zeros(X))
    return model


PLAIN = {
    "aliased": Aliased,
    "encoder": Encoder,
    "listed": Listed,
    "aliased owner": AliasedOwner,
    "asks for norms": AsksForNorms,
    "gathers after norms": GathersAfterNorms,
    "kept for itself": lambda: Returned(KeepsForItself),
    "scripted": Scripted,
    "skips from norms": SkipsFromNorms,
    "asks for weights": AsksForWeights,
    "counts norms": CountsNorms,
    "gives numbers": GivesNumbers,
    "detects": Detects,
}
INJECTED = {
    "encoder": Encoder,
    "aliased owner": AliasedOwner,
    "kept": Kept,
    "kept in a store": lambda: Kept(SimpleNamespace(items={})),
    "pyramid": Pyramid,
    "used elsewhere": UsedElsewhere,
    "used elsewhere, bottleneck": lambda: UsedElsewhere(4),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("name", PLAIN)
def test_layers_are_left_where_code_would_give_something_else(name):
    torch.manual_seed(0)
    model = prepare(PLAIN[name]())
    assert_same(model, optimize(model, torch.zeros(X)))


@pytest.mark.parametrize("name", INJECTED)
def test_blocks_take_over_no_more_than_they_may(name):
    torch.manual_seed(0)
    model = prepare(inject(INJECTED[name](), example=torch.zeros(X)))
    fast = optimize(model)
    assert any(isinstance(m, FusedSqueezeExcite) for m in fast.modules())
    assert_same(model, fast)
    if hasattr(model, "encode"):
        torch.testing.assert_close(fast.encode(torch.ones(X)), model.encode(torch.ones(X)))


def test_a_map_in_an_object_that_is_returned_stays():
    torch.manual_seed(0)
    model, x = train_a_little(GivesAnObject()), torch.randn(X)
    with torch.no_grad():
        found, expected = optimize(model, torch.zeros(X))(x), model(x)
    assert torch.equal(found.a, expected.a)
    assert torch.equal(found.b, expected.b)


def test_a_course_that_depends_on_data_is_seen_on_zeros_and_draws_nothing():
    torch.manual_seed(0)
    model, state = train_a_little(Detects()), torch.get_rng_state()
    assert count_norms(optimize(model, torch.zeros(X))) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_norms_with_one_activation_stay_apart():
    norms, act = [timm.layers.BatchNormAct2d(8) for _ in range(2)], nn.PReLU()
    for norm in norms:
        norm.act = act
    fast = optimize(train_a_little(nn.Sequential(conv(3, 8), norms[0], conv(8, 8), norms[1])), torch.zeros(X))
    seen = []
    fast[1].register_forward_hook(lambda *_: seen.append(1))
    fast(torch.zeros(X))
    assert count_norms(fast) == 0
    assert len(seen) == 1


def test_norms_are_folded_wherever_they_are_called_from():
    for kind, rest in ((Aliased, 0), (Listed, 0), (Encoder, 15), (AliasedOwner, 0)):  # Encoder runs five of twenty
        assert count_norms(optimize(train_a_little(kind()), torch.zeros(X))) == rest
    fast = optimize(train_a_little(AsksForNorms()), torch.zeros(X))
    assert count_norms(fast) == 1
    assert isinstance(fast.other[1], nn.Identity)


class Caching(nn.Module):
    """What attention of timm's does in eval mode: what it has computed once it does not compute again."""

    def __init__(self):
        super().__init__()
        self.body, self.cache = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)), {}

    def forward(self, x):
        if x.shape[-1] not in self.cache:
            self.cache[x.shape[-1]] = torch.arange(x.shape[-1]).float().sin()
        return self.body(x) + self.cache[x.shape[-1]]


def test_what_code_computes_once_does_not_matter():
    model = train_a_little(Caching())
    assert count_norms(optimize(model, torch.zeros(X))) == 0
    assert model.cache == {}


def test_a_batch_of_one_without_its_dimension_keeps_its_norm():
    model = prepare_lengths()
    fast, x = optimize(model, torch.zeros(8, 8)), torch.randn(8, 8)
    assert count_norms(fast) == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def prepare_lengths():
    torch.manual_seed(0)
    return train_a_little(nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)))


@pytest.mark.parametrize("sees", [list.append, lambda seen, x: seen.append(x.detach().clone())])
def test_what_a_hook_is_shown_stays(sees):
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Sequential(conv(3, 8, 3)), nn.BatchNorm2d(8)), []
    model[0].register_forward_hook(lambda _, given, y: sees(seen, y))
    fast = optimize(train_a_little(model), torch.zeros(X))
    seen.clear()
    x = torch.randn(X)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert torch.equal(*seen)


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Sequential(conv(10, 4), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.head(self.backbone(x)[:, :, None, None])


class Early(nn.Module):
    """Runs the layers of a block by itself, too."""

    def __init__(self):
        super().__init__()
        self.net = inject(torchvision.models.resnet50(num_classes=4), example=torch.zeros(2, 3, 32, 32))

    def forward(self, x):
        return self.net(x)

    def early(self, x):
        net = self.net
        x = net.layer1[0](net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        block = net.layer1[1]
        x = block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))
        return block.bn3(block.conv3(x))


def test_methods_of_what_is_around_run_the_layers_of_a_block_as_before():
    torch.manual_seed(0)
    model, x = train_a_little(Early()), torch.randn(2, 3, 32, 32)
    fast = optimize(model, x)
    with torch.no_grad():
        torch.testing.assert_close(fast.early(x), model.early(x), rtol=1e-4, atol=1e-4)


def test_injected_networks_in_others_are_optimized(tmp_path):
    model = prepare(Detector(inject(torchvision.models.resnet18(num_classes=10))))
    fast = optimize(model, torch.zeros(X))
    assert count_norms(fast) == 0
    assert {type(block) for block in blocks(fast).values()} == {FusedSqueezeExcite}
    assert_same(model, fast, shapes=(X, (3, 3, 64, 48)))
    for act in (eject, optimize):
        with pytest.raises(ModelError, match="is optimized"):
            act(fast.backbone)
    save(fast.backbone, tmp_path / "fast.pt")
    again = load(tmp_path / "fast.pt", base=torchvision.models.resnet18(num_classes=10))
    assert_same(fast.backbone, again, shapes=[(2, 3, 64, 48)])


def test_what_was_taken_out_after_the_injection_does_not_matter():
    model = inject(torchvision.models.resnet18(num_classes=10))
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 10)
    model.layer1 = nn.Sequential(model.layer1[0])
    model = prepare(model)
    fast = optimize(model)
    assert len(blocks(fast)) == 5
    assert_same(model, fast)


def test_adapters_stay_with_the_network_that_they_were_made_for(tmp_path):
    net = torchvision.models.resnet18(num_classes=4)
    save_adapter(inject(net), tmp_path / "birds.pt")
    fast = optimize(load_adapter(net, tmp_path / "birds.pt", name="birds"))
    with pytest.raises(ModelError, match="is optimized"), disable_adapters(fast):
        pass
    with pytest.raises(ModelError, match="is optimized"):
        set_adapter(fast, "birds")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_exporter_of_old_takes_it():
    model, file = optimize(inject(torchvision.models.resnet18(num_classes=4))), io.BytesIO()
    torch.onnx.export(model, (torch.zeros(X),), file, dynamo=False)
    names = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert names.count("Sigmoid") == 8


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_and_compiled_networks_are_refused():
    net = torchvision.models.resnet18(num_classes=4).eval()
    with pytest.raises(ModelError, match="is scripted"):
        optimize(torch.jit.trace(net, torch.zeros(X)), torch.zeros(X))
    with pytest.raises(ModelError, match="is compiled"):
        optimize(torch.compile(net, backend="eager"), torch.zeros(X))


class Casting(nn.Module):
    """Adds in fp32, whatever the type of its layers."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))
        self.stem = conv(3, 16)

    def forward(self, x):
        x = self.stem(x)
        return (x.float() + self.branch(x).float()).relu().to(x.dtype)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_network_that_casts_its_maps_can_be_converted(kind):
    x = torch.randn(X)
    net = inject(Casting().eval(), example=x)
    assert len(blocks(net)) == 1
    train_a_little(net)
    expected = net(x)
    fast = optimize(net, x)
    for model in (net.to(kind), optimize(net, x.to(kind)), fast.to(kind)):
        found = model(x.to(kind))
        assert found.dtype == kind
        torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)


class Basic(nn.Module):
    """Its maps come from convolutions of 3x3, which stay where they are."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bn = conv(3, 16), conv(16, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.stem(x)
        return torch.relu(x + self.bn(self.conv(x)))


def optimize_basic():
    net = inject(Basic().eval(), example=torch.zeros(X))
    train_a_little(net)
    fast = optimize(net, torch.zeros(X))
    assert len([module for module in fast.modules() if isinstance(module, FusedSqueezeExcite)]) == 1
    return net, fast


def test_a_map_that_a_later_hook_looks_at_is_not_written_on():
    _, fast = optimize_basic()
    x = torch.randn(X)
    with torch.no_grad():
        expected = fast(x)
        seen = []
        fast.conv.register_forward_hook(lambda module, args, output: seen.extend((output, output.clone())))
        assert torch.equal(fast(x), expected)
    assert torch.equal(*seen)


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_network_without_hooks_writes_on_its_maps():
    _, fast = optimize_basic()
    with torch.no_grad(), Operators() as operators:
        fast(torch.randn(X))
    assert "aten.addcmul.out" in operators.names


@pytest.mark.parametrize("observe", ["all", "block", "block before"])
def test_what_other_hooks_keep_is_not_written_on(observe):
    _, fast = optimize_basic()
    seen = []

    def keep(_, args, output=None):
        seen.extend((x, x.clone()) for x in (*args, output) if isinstance(x, torch.Tensor))

    handle = {
        "all": register_module_forward_hook,
        "block": fast.se.register_forward_hook,
        "block before": fast.se.register_forward_pre_hook,
    }[observe](keep)
    try:
        with torch.no_grad():
            fast.eval()(torch.randn(X))
    finally:
        handle.remove()
    maps = [pair for pair in seen if pair[0].ndim == 4]
    assert maps
    assert all(torch.equal(*pair) for pair in maps)


def test_a_copy_looks_for_hooks_on_its_own_layers():
    _, fast = optimize_basic()
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        seen = []
        copied.conv.register_forward_hook(lambda module, args, output, seen=seen: seen.extend((output, output.clone())))
        with torch.no_grad():
            copied(torch.randn(X))
        assert torch.equal(*seen)


@pytest.mark.parametrize("has_gradients", [True, False])
def test_torch_fx_traces_an_optimized_network(has_gradients):
    _, fast = optimize_basic()
    x = torch.randn(X)
    with torch.set_grad_enabled(has_gradients):
        traced = fx.symbolic_trace(fast)
        features = create_feature_extractor(fast, ["conv"])(x)["conv"]
        assert torch.equal(traced(x), fast(x))
        assert torch.equal(features, fast.conv(fast.stem(x)))
    x.requires_grad_()
    traced(x).sum().backward()
    assert bool(x.grad.any())
