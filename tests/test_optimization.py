"""The network for evaluation alone: the same outputs, fewer passes over the maps."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import types

import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_inject import SqueezeExcite, blocks, eject, inject, load, make_plan, optimize, save, standardize
from se_inject.errors import ArtifactError, ExampleError, ModelError
from se_inject.fused import FusedSqueezeExcite
from se_inject.traffic import ByteCounter
from tests import nets
from tests.forgery import forge

SIZE = 64


class Bottleneck(nn.Module):
    """As timm's and torchvision's, with a drop path that does nothing in eval mode."""

    def __init__(self, inp=16, width=4, out=16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.drop(self.bn3(self.conv3(out)))
        out += x
        return self.relu(out)


def train_a_little(model):
    """Give norms and blocks values as training does, so that nothing is an identity by chance."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor, low, high):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            draw(module.running_mean, -0.2, 0.2)
            draw(module.running_var, 0.5, 1.5)
            if module.affine:
                draw(module.weight, 0.5, 1)
                draw(module.bias, -0.2, 0.2)
    for block in blocks(model).values():
        for parameter in block.fc2.parameters() if isinstance(block, SqueezeExcite) else ():
            draw(parameter, -0.5, 0.5)
    return model.eval()


def assert_equal_to_double(model, optimized, x, *args):
    """To 1e-5 of the largest output, which is the promise; or to three times what the network itself is off."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double(), *args)
        found, own = optimized(x, *args), model(x, *args)
    assert found.dtype == x.dtype
    limit = max(1e-5 * expected.abs().max(), 3 * (own - expected).abs().max())
    assert (found - expected).abs().max() < limit


def make(name="resnet26", **options):
    return train_a_little(inject(timm.create_model(name, num_classes=10), **options))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return make()


@pytest.fixture
def x():
    return torch.randn(2, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet26", {"placement": "pre"}),
        ("resnet26", {"placement": "post"}),
        ("resnet26", {"placement": "identity"}),
        ("resnet26", {"placement": "conv3x3"}),
        ("resnet26", {"squeeze": "max"}),
        ("resnet26", {"gate": "tanh"}),
        ("resnet26", {"gate": "hard_sigmoid"}),
        ("resnet26", {"bias": False}),
        ("resnet26", {"block": "eca"}),
        ("resnext26ts", {}),
        ("res2net50_14w_8s", {}),
        ("mobilenetv2_050", {}),
        ("regnetx_002", {}),
        ("densenet121", {"concat": "separate"}),
        ("convnext_atto", {}),
        ("repvgg_a0", {}),
        ("lcnet_050", {}),  # the blocks' owners are convolutions, which have no bias before a norm is folded into them
        ("dla34", {}),
        ("cspresnet50", {}),
        ("inception_resnet_v2", {}),
        ("vgg11_bn", {}),
    ],
)
def test_outputs_are_the_same_to_a_hundred_thousandth(name, options):
    size = 96 if "inception" in name else SIZE
    model = make(name, **options, example=torch.randn(2, 3, size, size))
    optimized = optimize(model)
    assert isinstance(optimized, type(model))
    assert list(blocks(optimized)) == list(blocks(model))
    assert_equal_to_double(model, optimized, torch.randn(2, 3, size, size))
    assert_equal_to_double(model, optimized, torch.randn(1, 3, size, size))


def test_a_convolution_that_would_not_add_a_bias_keeps_its_norm(x):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), Bottleneck()

        def forward(self, x):
            return self.block(self.bn(nn.functional.conv2d(x, self.conv.weight)))

    model = train_a_little(inject(Functional()))
    fast = optimize(model, x)
    assert type(fast.bn) is nn.BatchNorm2d
    assert type(fast.block.bn1) is nn.Identity
    assert fast.conv.bias is None
    assert model.conv.bias is None
    assert_equal_to_double(model, fast, x)


def test_a_bottleneck_is_a_few_lines(resnet):
    optimized = optimize(resnet)
    assert isinstance(optimized, timm.models.ResNet)
    assert not any(isinstance(m, _BatchNorm) for m in optimized.modules())
    assert (
        inspect.getsource(type(optimized.layer1[1]))
        == '''\
class FastSEBottleneck(SEBottleneck):
    """SEBottleneck for evaluation: `se` runs `conv3` and ends with relu."""

    def forward(self, x):
        out = self.conv1(x)
        out = self.act1(out)
        out = self.conv2(out)
        out = self.act2(out)
        return self.se(out, shortcut=x)
'''
    )
    assert all(type(block) is FusedSqueezeExcite for block in blocks(optimized).values())
    assert {block.gain for block in blocks(optimized).values()} == {1}


def test_the_model_is_left_as_it_was(resnet, x):
    before = copy.deepcopy(resnet.state_dict())
    types = [type(m) for m in resnet.modules()]
    optimize(resnet)
    assert [type(m) for m in resnet.modules()] == types
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    assert all(p.requires_grad for p in resnet.parameters())


def count_bytes(model, x):
    with torch.no_grad(), ByteCounter() as counter:
        model(x)
    return counter.count


def test_blocks_cost_one_pass_over_the_narrow_map():
    torch.manual_seed(0)
    plain = nets.wrap(Bottleneck())
    model = train_a_little(inject(plain, r=4))
    x = torch.randn(4, 3, 32, 32)
    extra = count_bytes(optimize(model), x) - count_bytes(optimize(plain), x)
    narrow = 4 * 4 * 32 * 32 * 4
    assert narrow <= extra < narrow + 10_000  # the block's own layers and means
    assert_equal_to_double(model, optimize(model), x)


def test_a_map_that_somebody_else_reads_is_not_written_on():
    class Kept(nets.Residual):
        def forward(self, x):
            self.kept = self.branch(x)
            return x + self.kept, self.kept

    torch.manual_seed(0)
    model = train_a_little(inject(Kept(8), r=4, example=torch.zeros(2, 8, 8, 8)))
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        for found, expected in zip(optimize(model)(x), model(x), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("who", ["conv1", "bn1", "bn3", "se"])
def test_what_somebody_looks_at_is_left(who):
    torch.manual_seed(0)
    model = train_a_little(inject(nets.wrap(Bottleneck()), r=4))
    seen = []
    model[1].get_submodule(who).register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 8, 8)
    optimized = optimize(model)
    seen.clear()  # the hook ran over fake tensors
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x))
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("who", ["conv1", "bn1", "conv3", "bn3", "se", "se.fc2"])
def test_a_layer_whose_forward_is_its_own_is_left(who):
    """As accelerate's hooks make it, which set `forward` on the instance."""
    torch.manual_seed(0)
    model = train_a_little(inject(nets.wrap(Bottleneck()), r=4))
    layer = model[1].get_submodule(who)
    layer.forward = types.MethodType(
        lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs) * 0.5, layer
    )
    assert_equal_to_double(model.eval(), optimize(model), torch.randn(2, 3, 8, 8))


class Unfoldable(nn.Module):
    """Convolutions that something beside their norm reads, or that run twice, or share a weight."""

    def __init__(self):
        super().__init__()
        self.read = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.tied, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.tied.weight
        self.returned = nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))

    def forward(self, x):
        x = self.read(x)
        x = x + self.norms[0](x)
        x = self.norms[2](self.twice(self.norms[1](self.twice(x))))
        x = self.norms[4](self.other(self.norms[3](self.tied(x))))
        returned = self.returned(x)
        return self.norms[5](returned), returned


def test_norms_stay_where_folding_would_be_wrong():
    torch.manual_seed(0)
    model = train_a_little(Unfoldable())
    optimized = optimize(model, torch.zeros(2, 3, 8, 8))
    assert sum(isinstance(m, _BatchNorm) for m in optimized.modules()) == 6
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for found, expected in zip(optimized(x), model(x), strict=True):
            assert torch.equal(found, expected)


def test_a_norm_stays_where_timm_reads_the_map_before_it(x):
    model = train_a_little(timm.create_model("ghostnet_050", num_classes=7))  # before bn1
    optimized = optimize(model, x)
    assert isinstance(optimized.bn1, _BatchNorm)
    assert sum(isinstance(m, _BatchNorm) for m in optimized.modules()) == 1
    with torch.no_grad():
        expected = model.double().forward_intermediates(x.double(), intermediates_only=True)
        for found, right in zip(optimized.forward_intermediates(x, intermediates_only=True), expected, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


class Domains(nn.Module):
    """Layers with batch norms for each domain (Chang et al., arXiv 1906.03950), and one for all."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 1), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x, domain=0):
        return self.bn2[domain](self.conv2(self.bn1(self.conv1(x)).relu()))


def test_norms_of_domains_that_did_not_run_keep_the_convolution_before_them():
    torch.manual_seed(0)
    model, x = Domains(), torch.randn(2, 3, 6, 6)
    for domain in (0, 1):  # statistics of their own
        model.train()(torch.randn(4, 3, 6, 6) * (domain + 2), domain)
    optimized = optimize(model.eval(), x)
    assert type(optimized.bn1) is nn.Identity
    assert_equal_to_double(model, optimized, x)
    assert_equal_to_double(model, optimized, x, 1)


def test_transposed_and_grouped_convolutions_and_norms_with_activations_are_folded():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        timm.layers.BatchNormAct2d(8),
        nn.ConvTranspose2d(8, 12, 2, stride=2),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, groups=6, bias=False),
        nn.BatchNorm2d(12, affine=False),
    )
    optimized = optimize(train_a_little(model), torch.zeros(2, 3, 16, 16))
    assert [type(m) for m in optimized if not isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))] == [
        nn.ReLU,
        nn.Identity,
        nn.Identity,
    ]
    assert_equal_to_double(model, optimized, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_stay(dtype, resnet, x):
    optimized = optimize(copy.deepcopy(resnet).to(dtype))
    assert {p.dtype for p in optimized.parameters()} == {dtype}
    with torch.no_grad():
        expected = copy.deepcopy(resnet).double()(x.double())
        found = optimized(x.to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_autocast_and_channels_last(resnet, x):
    optimized = optimize(resnet).to(memory_format=torch.channels_last)
    assert_equal_to_double(resnet, optimized, x.contiguous(memory_format=torch.channels_last))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = optimized(x), resnet(x)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_an_input_that_wants_a_gradient_gets_it(resnet, x):
    gradients = []
    for model in (resnet, optimize(resnet)):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item())


def test_copies_and_pickles_are_the_same(resnet, x, tmp_path):
    optimized = optimize(resnet)
    torch.save(optimized, tmp_path / "whole.pt")
    copies = [
        copy.deepcopy(optimized),
        pickle.loads(pickle.dumps(optimized)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ]
    with torch.no_grad():
        for again in copies:
            assert torch.equal(again(x), optimized(x))
    code = (
        "import sys, torch; model, x, y = sys.argv[1:]; "
        "torch.save(torch.load(model, weights_only=False)(torch.load(x)), y)"
    )
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("whole.pt", "x.pt", "y.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=environment, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), optimized(x))


def test_torch_compile_and_export(resnet, x):
    optimized = optimize(resnet)
    with torch.no_grad():
        expected = optimized(x)
        compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(optimized, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
        assert program.module()(torch.cat([x, x]))[:2].shape == expected.shape


def test_arguments_that_the_example_did_not_give_are_taken(x):
    model = make("repvgg_a0")
    fast = optimize(model)
    with torch.no_grad():
        features = model.forward_features(x)
        expected = model.forward_head(features.clone(), pre_logits=True)
        torch.testing.assert_close(fast.forward_head(features, pre_logits=True), expected)


def test_a_graph_module_stays_one():
    torch.manual_seed(0)
    model = train_a_little(inject(fx.symbolic_trace(torchvision.models.resnet18(num_classes=4)), r=4))
    optimized = optimize(model)
    assert isinstance(optimized, fx.GraphModule)
    assert "self.layer1_0_bn1" not in optimized.code.replace(".", "_")
    assert_equal_to_double(model, optimized, torch.randn(2, 3, SIZE, SIZE))
    with torch.no_grad():
        x = torch.randn(1, 3, SIZE, SIZE)
        assert torch.equal(copy.deepcopy(optimized)(x), optimized(x))


@pytest.mark.parametrize("form", ["as it is", "standard form"])
def test_an_artifact_gives_the_optimized_network_back(form, resnet, x, tmp_path):
    model = standardize(resnet) if form == "standard form" else resnet
    optimized = optimize(model)
    save(optimized, tmp_path / "fast.pt")
    again = load(tmp_path / "fast.pt")
    assert [type(m) for m in again.modules()] == [type(m) for m in optimized.modules()]
    with torch.no_grad():
        assert torch.equal(again(x), optimized(x))
    save(again, tmp_path / "again.safetensors")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again.safetensors")(x), optimized(x))


def test_an_artifact_remembers_the_example(tmp_path, x):
    torch.manual_seed(0)
    model = train_a_little(inject(nets.wrap(Bottleneck()), r=4, example=torch.zeros(2, 3, 8, 8)))
    optimized = optimize(model, torch.zeros(2, 3, 32, 32))
    save(optimized, tmp_path / "fast.pt")
    again = load(tmp_path / "fast.pt", base=nets.wrap(Bottleneck()))
    with torch.no_grad():
        assert torch.equal(again(x), optimized(x))
    values = torch.load(tmp_path / "fast.pt")
    assert values["optimization"]["args"][0]["tensor"] == [2, 3, 32, 32]
    forge(tmp_path / "fast.pt", lambda content: content.update(optimization="yes"), target=tmp_path / "bad.pt")
    with pytest.raises(ArtifactError, match="'yes' is no call"):
        load(tmp_path / "bad.pt", base=nets.wrap(Bottleneck()))


@pytest.mark.parametrize("act", [inject, make_plan, eject, standardize, optimize])
def test_an_optimized_network_is_not_worked_on(act, resnet):
    with pytest.raises(ModelError, match="optimized|injected already"):
        act(optimize(resnet))


def test_what_cannot_be_optimized_says_why():
    with pytest.raises(ModelError, match=r"found a str; expected a torch\.nn\.Module"):
        optimize("resnet50")
    with pytest.raises(ExampleError, match=r"does not run on an input of shape \(2, 7, 8, 8\)"):
        optimize(nets.wrap(Bottleneck()), torch.zeros(1, 7, 8, 8))


def test_a_network_whose_course_depends_on_its_data_is_run():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nets.wrap(Bottleneck())

        def forward(self, x):
            y = self.body(x)
            return y * 2 if y.sum() > 1e9 else y

    torch.manual_seed(0)
    model = train_a_little(Branching())
    optimized = optimize(model, torch.zeros(2, 3, 8, 8))
    assert not any(isinstance(m, _BatchNorm) for m in optimized.modules())
    assert_equal_to_double(model, optimized, torch.randn(2, 3, 8, 8))


class PadIfOdd(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x, (0, x.shape[-1] % 2)) if x.shape[-1] % 2 else x


class Last(nn.Module):
    def forward(self, x):
        self.shape = x.shape
        return x


def test_children_that_give_back_what_they_were_handed_once_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pad, self.last = nn.Conv2d(3, 16, 3, padding=1), PadIfOdd(), Last()
            self.conv, self.bn, self.drop = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Sequential(nn.Dropout(0.5))

        def forward(self, x):
            x = self.pad(self.stem(x))
            return nn.functional.relu(self.drop(self.last(self.bn(self.conv(x)))) + x)

    torch.manual_seed(0)
    model = train_a_little(inject(Net(), example=torch.zeros(2, 3, 8, 8)))
    fast = optimize(model)
    assert_equal_to_double(model, fast, torch.randn(2, 3, 9, 11))
    assert fast.last.shape == (2, 16, 9, 12)
    assert "drop" not in inspect.getsource(type(fast).forward)


READS = {
    "a tied decoder": lambda net, y: nn.functional.conv2d(y, net.body.conv3.weight.flip(0).transpose(0, 1)),
    "a linear layer": lambda net, y: nn.functional.linear(y.mean((2, 3)), net.body.conv3.weight.flatten(1).t()),
    "a penalty": lambda net, y: (y, net.body.conv2.weight.norm(), net.body.bn1.weight.sum()),
    "the weight": lambda net, y: (y, net.body.conv3.weight),
    "the statistics": lambda net, y: nn.functional.batch_norm(
        y[:, :4], net.body.bn2.running_mean, net.body.bn2.running_var
    ),
    "a type": lambda net, y: y.to(net.body.conv3.weight.dtype),
    "a shape": lambda net, y: y[:, : net.body.bn3.weight.shape[0]],
    "channels": lambda net, y: y[:, : min(net.body.bn3.num_features, net.body.conv3.out_channels)],
    "a norm as a function": lambda net, y: nn.functional.batch_norm(
        y, net.other.running_mean, net.other.running_var, net.other.weight, net.other.bias
    ),
    "another epsilon": lambda net, y: nn.functional.batch_norm(
        y, net.other.running_mean, net.other.running_var, eps=1.0
    ),
}


@pytest.mark.parametrize("name", READS)
def test_layers_whose_tensors_are_read_elsewhere_stay(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 16, 1), Bottleneck()
            self.tail, self.other = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            return READS[name](self, self.tail(self.body(self.stem(x))))

    torch.manual_seed(0)
    model = train_a_little(inject(Net(), example=torch.zeros(2, 3, 8, 8)))
    fast, x = optimize(model), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    stays = name in {"a tied decoder", "a linear layer", "the weight", "a type", "a shape"}
    assert isinstance(fast.body.bn3, nn.Identity) != stays


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the old weight_norm
def test_a_block_whose_layers_are_watched_or_changed_runs_as_it_is(resnet, x):
    model = copy.deepcopy(resnet)
    model.layer1[0].se.fc2.register_forward_hook(lambda *args: args[2] * 0.5)
    with torch.no_grad():
        torch.nn.utils.weight_norm(model.layer2[0].se.fc2).weight_g.mul_(2)
    block = model.layer3[0].se
    block.fc2 = nn.Sequential(block.fc2, nn.Dropout(0.1))
    fast = optimize(model.eval())
    kinds = [type(block).__name__ for block in blocks(fast).values()]
    assert kinds.count("SqueezeExcite") == 3
    assert kinds.count("FusedSqueezeExcite") == len(kinds) - 3
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which forward-mode differentiation uses
def test_transforms_of_torch_func(resnet, x):
    fast = optimize(resnet)
    with torch.no_grad():
        expected = resnet(x)
        found = torch.func.vmap(lambda image: fast(image[None])[0])(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(torch.func.jvp(fast, (x,), (x,)), torch.func.jvp(resnet, (x,), (x,)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(resnet, x):
    optimized, x = optimize(resnet).cuda(), x.cuda()
    with torch.no_grad():
        expected = optimized(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = optimized(x)
        graph.replay()
    torch.testing.assert_close(found, expected)


def test_a_copy_has_no_tensor_of_the_original():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
    )
    net[4].weight = net[2].weight  # one that is folded, and one that is not
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = optimize(net, torch.zeros(1, 3, 8, 8))
    own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *net.buffers())}
    assert not own & {x.untyped_storage().data_ptr() for x in (*fast.parameters(), *fast.buffers())}
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(fast[4].weight, net[4].weight)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), net.eval()(x))
