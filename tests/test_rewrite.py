import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import fx, nn

from se_inject import SqueezeExcite, blocks, inject, make_plan, optimize
from se_inject.errors import ModelError, OptionError
from tests import nets
from tests.equality import assert_equal_outputs, assert_same_network
from tests.oracle import count_merges

RESIDUALS = [
    nets.Residual,
    nets.ResidualInPlace,
    nets.ResidualTorchAdd,
    nets.ResidualMethodAdd,
    nets.ResidualAddStatement,
]
BLOCKS = [
    *RESIDUALS,
    nets.Projected,
    nets.SumOfThree,
    nets.Dropped,
    nets.TrainBranch,
    nets.Optional,
    nets.Dense,
    nets.Fire,
    nets.Shuffle,
]
ROOTS = [nets.UNet, nets.TwoBranches, nets.Split, nets.Shared]
NETS = [*(lambda block=block: nets.wrap(block(), 32 if block is nets.Shuffle else 16) for block in BLOCKS), *ROOTS]
IDS = [block.__name__ for block in (*BLOCKS, *ROOTS)]


@pytest.fixture(params=NETS, ids=IDS)
def net(request):
    return request.param()


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


def test_a_fresh_injection_changes_nothing(net, x):
    injected = inject(net)
    assert blocks(injected)
    assert_same_network(net, injected, x)


def test_nor_at_another_size_and_for_one_image(net):
    injected = inject(net).eval()
    x = torch.randn(1, 3, 12, 20)
    assert torch.equal(net.eval()(x), injected(x))


def test_every_merge_that_runs_is_a_site_or_has_a_reason(net, x):
    plan = make_plan(net)
    assert sum(item.num_merges for item in (*plan.sites, *plan.passed_over)) == count_merges(net, x)


def test_after_two_steps_every_parameter_of_a_block_has_moved(net, x):
    injected = inject(net).train()
    before = {name: p.detach().clone() for name, p in injected.named_parameters()}
    optimizer = torch.optim.Adam(injected.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        injected(x).square().sum().backward()
        optimizer.step()
    for path, block in blocks(injected).items():
        for name, parameter in block.named_parameters():
            assert parameter.grad.abs().sum() > 0, f"{path}.{name}"
            assert not torch.equal(parameter, before[f"{path}.{name}"]), f"{path}.{name}"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_do_the_same(net, x, copier):
    injected = inject(net).eval()
    for block in blocks(injected).values():
        nn.init.normal_(block.fc2.weight)
    again = copier(injected)
    assert [type(m) for m in again.modules()] == [type(m) for m in injected.modules()]
    assert torch.equal(injected(x), again(x))
    assert not set(map(id, injected.modules())) & set(map(id, again.modules()))


def test_a_pickle_loads_in_a_process_of_its_own(tmp_path, x):
    model = inject(torchvision.models.resnet18(num_classes=5)).eval()
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "whole.pt")
    script = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(saved['model'](saved['x']), saved['y']); print(type(saved['model'].layer1[0]).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "whole.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "SEBasicBlock"


def test_the_original_is_untouched(net, x):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    described = [(type(m), sorted(vars(m)), m.training) for m in net.modules()]
    inject(net)
    assert [(type(m), sorted(vars(m)), m.training) for m in net.modules()] == described
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_inplace_changes_the_given_model_and_no_other_way_does():
    model = nets.TwoBranches()
    assert inject(model, inplace=True) is model
    assert len(blocks(model)) == 2
    other = nets.TwoBranches()
    assert inject(other) is not other


def test_class_attributes_hooks_and_keys_stay():
    model = timm.create_model("resnet18", num_classes=10)
    model.note = "mine"
    calls = []
    model.layer4.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    injected = inject(model)
    assert type(injected) is type(model)
    assert isinstance(injected.layer1[0], type(model.layer1[0]))
    assert injected.note == "mine"
    assert injected.layer1[0].__class__.__name__ == "SEBasicBlock"
    keys = [key for key in injected.state_dict() if ".se." not in key]
    assert keys == list(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(injected.eval().forward_features(x), model.eval().forward_features(x))
    calls.clear()
    injected(x)
    assert calls == [(1, 512, 2, 2)]
    injected.reset_classifier(3)
    assert injected(x).shape == (1, 3)
    assert [f.shape for f in injected.forward_intermediates(x, intermediates_only=True)][-1] == (1, 512, 2, 2)


def test_features_are_gated_too_when_they_are_asked_for_alone():
    injected = inject(nets.Split()).eval()
    x = torch.randn(2, 3, 8, 8)
    before = injected.forward_features(x)
    nn.init.normal_(injected.se.fc2.weight)
    assert not torch.equal(injected.forward_features(x), before)
    assert torch.equal(injected(x), injected.forward_head(injected.forward_features(x)))


def test_the_source_can_be_shown():
    block = inject(torchvision.models.resnet18()).layer1[0]
    assert "out = self.se(out, shortcut=x)" in inspect.getsource(type(block))
    assert "out = self.se(out, shortcut=x)" in inspect.getsource(block.forward)


def test_alike_blocks_share_a_class():
    injected = inject(torchvision.models.resnet50())
    assert len({type(m) for m in injected.modules() if type(m).__name__ == "SEBottleneck"}) == 2


def test_counts_and_parameters_are_those_of_timms_seresnet50():
    expected = sum(p.numel() for p in timm.create_model("seresnet50").parameters())
    for model in (timm.create_model("resnet50"), torchvision.models.resnet50()):
        injected = inject(model, r=16)
        assert len(blocks(injected)) == 16
        assert sum(p.numel() for p in injected.parameters()) == expected == 28_088_024


def test_the_new_keys_are_those_of_timms_seresnet50():
    injected, peer = inject(timm.create_model("resnet50")), timm.create_model("seresnet50")
    assert {k: v.shape for k, v in injected.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}


def test_train_flags_and_gradients_are_kept():
    model = nets.wrap(nets.Residual()).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[1].conv1.weight.requires_grad_(False)
    injected = inject(model)
    for name, module in model.named_modules():
        assert injected.get_submodule(name).training == module.training
    assert not injected[1].se.training
    assert not injected[0].weight.requires_grad
    assert not injected[1].conv1.weight.requires_grad
    assert all(p.requires_grad for p in injected[1].se.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_work(dtype, x):
    model = nets.TwoBranches().to(dtype).eval()
    injected = inject(model)
    assert {p.dtype for p in injected.parameters()} == {dtype}
    assert torch.equal(model(x.to(dtype)), injected(x.to(dtype)))


def test_a_model_on_the_meta_device_works():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    injected = inject(model)
    assert len(blocks(injected)) == 8
    assert {p.device.type for p in injected.parameters()} == {"meta"}
    assert injected(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_channels_last_weights_stay(x):
    model = nets.TwoBranches().to(memory_format=torch.channels_last).eval()
    injected = inject(model)
    assert injected.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(model(x), injected(x))


def test_an_example_with_several_arguments_can_be_given():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nets.Residual()

        def forward(self, x, *, other=None, **maps):
            return self.block(x)

    model = Two().eval()
    injected = inject(model, example=(torch.zeros(2, 16, 8, 8),))
    x = torch.randn(3, 16, 8, 8)
    assert torch.equal(model(x), injected(x))


def test_a_plan_can_be_looked_at_and_then_used(x):
    model = nets.TwoBranches().eval()
    plan = make_plan(model, include=["se"])
    injected = inject(model, plan=plan)
    assert list(blocks(injected)) == ["se"]
    assert torch.equal(model(x), injected(x))


def test_a_plan_and_options_do_not_go_together():
    model = nets.TwoBranches()
    with pytest.raises(OptionError, match="plan= holds all options already"):
        inject(model, plan=make_plan(model), r=8)


def test_a_name_that_is_taken_is_not_used():
    class Named(nets.Residual):
        def __init__(self):
            super().__init__()
            self.se = nn.Identity()

    assert list(blocks(inject(nets.wrap(Named())))) == ["1.se2"]


def test_a_graph_module_stays_one(x):
    model = fx.symbolic_trace(nets.TwoBranches().eval())
    injected = inject(model)
    assert isinstance(injected, fx.GraphModule)
    assert len(blocks(injected)) == 2
    assert torch.equal(model(x), injected(x))
    assert torch.equal(copy.deepcopy(injected)(x), injected(x))


def test_a_forward_chosen_for_the_instance_is_replaced(x):
    class Chosen(nets.Residual):
        def __init__(self):
            super().__init__()
            self.forward = self.forward_chosen

        def forward_chosen(self, x):
            return x + self.branch(x)

    net = nets.wrap(Chosen())
    injected = inject(net)
    assert len(blocks(injected)) == 1
    assert_same_network(net, injected, x)
    nn.init.normal_(injected[1].se.fc2.weight)
    assert not torch.equal(injected.eval()(x), net.eval()(x))


def test_a_forward_wrapped_by_a_library_is_passed_over():
    import functools

    net = nets.wrap(nets.SumOfThree())
    wrapped = nets.Residual()
    wrapped.forward = functools.partial(wrapped.forward)
    net.insert(1, wrapped)
    plan = make_plan(net)
    assert [site.owner for site in plan.sites] == ["2"]
    assert plan.passed_over[0].reason == "its forward was replaced on the instance, by a partial"


def test_the_network_is_not_run_on_real_data(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensor

    real = torch.nn.functional.conv2d
    seen = set()

    class Watched(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            seen.add(type(x))
            return super()._conv_forward(x, weight, bias)

    net = nets.wrap(nets.Residual())
    net[1].conv1.__class__ = Watched
    inject(net)
    assert seen == {FakeTensor}
    assert torch.nn.functional.conv2d is real


@pytest.mark.slow
def test_an_injection_takes_no_more_memory_than_the_copy_and_the_blocks():
    script = (
        "import resource, timm, se_inject; model = timm.create_model('wide_resnet101_2'); se_inject.inject\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); injected = se_inject.inject(model); grown = peak() - before\n"
        "print(grown, sum(t.nbytes for t in injected.state_dict().values()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 500e6
    assert grown < 1.1 * size  # Python's own objects, and the modules of torch that are imported


def test_generated_classes_do_not_keep_models_alive():
    import weakref

    injected = inject(nets.TwoBranches())
    weight = weakref.ref(injected.stem)
    del injected
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes_get_blocks_too(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm1, self.conv2 = conv(16, 16, 3, padding=1), norm(16), conv(16, 16, 3, padding=1)

        def forward(self, x):
            return x + self.conv2(torch.relu(self.norm1(self.conv1(x))))

    net = nn.Sequential(conv(2, 16, 3, padding=1), Block(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1))
    injected = inject(net)
    assert list(blocks(injected)) == ["1.se"]
    assert_same_network(net, injected, torch.randn(2, 2, *[9] * dims))
    assert injected[1].se.fc2.weight.grad.any()


def test_torchvisions_video_networks_get_blocks():
    model = nets.enliven(torchvision.models.video.r3d_18(weights=None, num_classes=4))
    injected = inject(model)
    assert len(blocks(injected)) == 8
    assert_same_network(model, injected, torch.randn(2, 3, 4, 32, 32))


def test_a_network_for_volumes_is_laid_out_with_the_channels_last():
    model = nn.Sequential(nn.Conv3d(3, 16, 3), nn.BatchNorm3d(16), nn.ReLU())
    injected = inject(model, at=["conv"], example=torch.zeros(2, 3, 8, 8, 8)).double()
    (block,) = blocks(injected).values()
    nn.init.normal_(block.fc2.weight)
    x = torch.randn(2, 3, 8, 8, 8, dtype=torch.float64)
    expected, shapes = injected(x), {name: p.shape for name, p in injected.named_parameters()}
    expected.sum().backward()
    parameters = dict(injected.named_parameters())
    injected.to(memory_format=torch.channels_last_3d)
    y = injected(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(y, expected)
    assert {name: p.shape for name, p in injected.named_parameters()} == shapes
    assert all(parameters[name] is p and p.grad.shape == p.shape for name, p in injected.named_parameters())
    assert injected.float()[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.filterwarnings("ignore")
def test_a_detection_network_gets_blocks_in_its_backbone():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plan = make_plan(model, include=["backbone.body.*"])
    assert {site.owner.split(".")[0] for site in plan.sites} == {"backbone"}
    injected = inject(model, plan=plan)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    images = [torch.rand(3, 64, 80), torch.rand(3, 100, 60)]
    with torch.no_grad():
        assert_equal_outputs(model(images), injected(images))
    targets = [{"boxes": torch.tensor([[1.0, 2.0, 30.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    losses = []
    for net in (model, injected):
        torch.manual_seed(0)
        losses.append(net.train()(images, targets))
    assert_equal_outputs(*losses)


def test_optical_flow_takes_two_images():
    model = torchvision.models.optical_flow.raft_small(weights=None)
    injected = inject(model)
    assert blocks(injected)
    images = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert_equal_outputs(model.eval()(*images, num_flow_updates=12), injected.eval()(*images, num_flow_updates=12))


def test_channels_last_blocks_squeeze_height_and_width():
    model = nets.enliven(timm.create_model("mambaout_femto", num_classes=4))
    injected = inject(model)
    assert {block.channel_dim for block in blocks(injected).values()} == {-1}
    assert_same_network(model, injected, torch.randn(2, 3, 64, 64))


@pytest.mark.filterwarnings("ignore")
def test_a_float_network_that_is_to_be_quantised_later_works():
    model = torchvision.models.quantization.resnet18(weights=None, num_classes=4)
    injected = inject(model)
    assert len(blocks(injected)) == 8
    assert_same_network(model, injected, torch.randn(2, 3, 64, 64))


def test_weight_normalised_layers_work(x):
    net = nets.wrap(nets.Residual())
    torch.nn.utils.parametrizations.weight_norm(net[1].conv1)
    injected = inject(net)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), injected.eval()(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit
def test_the_copy_of_a_scripted_module_can_be_trained(x):
    net = nets.wrap(nets.Residual())
    net[0] = torch.jit.script(net[0])
    next(net[0].parameters()).requires_grad_(False)
    injected = inject(net)
    assert all(parameter.is_leaf for parameter in injected.parameters())
    own = dict(injected.named_parameters())
    assert all(own[name].requires_grad == parameter.requires_grad for name, parameter in net.named_parameters())
    injected(x).sum().backward()
    optimize(injected)


def test_a_model_that_cannot_be_copied_says_so():
    class Stubborn(nets.TwoBranches):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(ModelError, match="Stubborn cannot be copied .no copies."):
        inject(Stubborn())


def test_moving_and_casting_works_afterwards(x):
    injected = inject(nets.TwoBranches()).eval()
    y = injected(x)
    assert torch.equal(injected.double().float()(x), y)
    buffer = io.BytesIO()
    torch.save(injected.state_dict(), buffer)
    buffer.seek(0)
    fresh = inject(nets.TwoBranches()).eval()
    fresh.load_state_dict(torch.load(buffer))
    assert_equal_outputs(fresh(x), y)


def test_a_block_is_a_module_to_be_used_on_its_own():
    assert SqueezeExcite(64, 16)(torch.ones(2, 64, 3, 3)).shape == (2, 64, 3, 3)


def test_it_does_not_matter_whether_the_caller_has_gradients_on():
    with torch.no_grad():
        assert list(blocks(inject(nets.wrap(nets.Residual())))) == ["1.se"]


def test_what_was_injected_in_inference_mode_can_be_trained(x):
    net = nets.TwoBranches()
    with torch.inference_mode():
        injected = inject(net)
    assert len(blocks(injected)) == 2
    injected(x).sum().backward()
    assert injected.se.fc2.weight.grad.any()
