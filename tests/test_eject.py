import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import fx, nn

from se_inject import blocks, eject, inject, load, save
from se_inject.artifact import get_source
from se_inject.errors import ModelError
from se_inject.rewrite import find_plan
from tests import nets


def describe(model):
    """Everything that is Python about a network: classes, attributes, keys, what is None, hooks."""
    return [
        (path, type(m), sorted(vars(m)), [*m._modules], sorted(k for k, v in vars(m).items() if v is None))
        for path, m in model.named_modules()
    ]


def assert_ejected(ejected, original, x):
    assert describe(ejected) == describe(original)
    assert list(ejected.state_dict()) == list(original.state_dict())
    assert find_plan(ejected) is None
    assert get_source(ejected) is None
    with torch.no_grad():
        assert torch.equal(ejected.eval()(x), original.eval()(x))


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture(params=["timm:resnet18", "torchvision:resnet18", "unet", "root"])
def net(request):
    match request.param:
        case "timm:resnet18":  # each block has `se = None`
            return timm.create_model("resnet18", num_classes=4)
        case "torchvision:resnet18":
            return torchvision.models.resnet18(num_classes=4)
        case "unet":
            return nets.UNet()
        case _:
            return nets.TwoBranches()


@pytest.mark.parametrize("inplace", [False, True])
def test_the_original_is_back(net, x, inplace):
    injected = inject(net)
    ejected = eject(injected, inplace=inplace)
    assert (ejected is injected) is inplace
    assert_ejected(ejected, net, x)
    assert bool(blocks(injected)) is not inplace


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_from_copies_too(net, x, copier):
    assert_ejected(eject(copier(inject(net))), net, x)


def test_from_a_file_too(net, x, tmp_path):
    save(inject(net), tmp_path / "net.pt")
    base = copy.deepcopy(net)
    assert_ejected(eject(load(tmp_path / "net.pt", base=base)), net, x)


def test_from_a_file_that_knows_its_source_too(tmp_path, x):
    net = timm.create_model("resnet18", num_classes=4)
    save(inject(net), tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt")
    assert get_source(loaded) is not None
    ejected = eject(loaded)
    assert get_source(ejected) is None
    assert torch.equal(ejected(x), net.eval()(x))


def test_after_training_it_is_the_backbone_with_its_weights(x):
    net = nets.TwoBranches()
    injected = inject(net).train()
    optimizer = torch.optim.SGD(injected.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        injected(x).square().sum().backward()
        optimizer.step()
    ejected = eject(injected)
    expected = copy.deepcopy(net)
    expected.load_state_dict({k: v for k, v in injected.state_dict().items() if k in net.state_dict()})
    assert not torch.equal(expected.stem.weight, net.stem.weight)
    assert_ejected(ejected, expected, x)


def test_it_can_be_injected_again(net, x):
    again = inject(eject(inject(net)))
    assert list(blocks(again)) == list(blocks(inject(net)))
    assert_ejected(eject(again), net, x)


def test_none_that_was_registered_as_a_module_is_back_in_its_place(x):
    class Registered(nets.Residual):
        def __init__(self):
            super().__init__()
            self.register_module("se", None)
            self.last = nn.Identity()

    net = nets.wrap(Registered())
    injected = inject(net)
    assert list(blocks(injected)) == ["1.se"]
    assert_ejected(eject(injected), net, x)


class Chosen(nets.Residual):
    def __init__(self):
        super().__init__()
        self.forward = self.forward_chosen

    def forward_chosen(self, x):
        return x + self.branch(x)


class Bound(nets.Residual):
    def __init__(self):
        super().__init__()
        self.forward = super().forward


@pytest.mark.parametrize("block", [Chosen, Bound])
@pytest.mark.parametrize(
    "copier", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_method_chosen_for_the_instance_is_back(x, block, copier):
    net = nets.wrap(block())
    ejected = eject(copier(inject(net)))
    with torch.no_grad():
        assert torch.equal(ejected.eval()(x), net.eval()(x))
    assert type(ejected[1]) is block
    if block is Chosen:
        assert ejected[1].forward.__self__ is ejected[1]
        assert ejected[1].forward.__func__ is Chosen.forward_chosen


@pytest.mark.parametrize(
    "copier", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("inner", [False, True])
def test_a_graph_module_has_its_graph_back(x, copier, inner):
    net = fx.symbolic_trace(nets.TwoBranches().eval())
    net = nn.Sequential(net) if inner else net
    injected = copier(inject(net))
    assert len(blocks(injected)) == 2
    ejected = eject(injected)
    with torch.no_grad():
        assert torch.equal(ejected(x), net(x))
    assert list(ejected.state_dict()) == list(net.state_dict())
    found, expected = (ejected[0], net[0]) if inner else (ejected, net)
    assert isinstance(found, fx.GraphModule)
    assert [(n.op, str(n.target)) for n in found.graph.nodes] == [(n.op, str(n.target)) for n in expected.graph.nodes]
    assert len(blocks(inject(ejected))) == 2


def test_a_copied_graph_module_knows_its_plan():
    injected = inject(fx.symbolic_trace(nets.TwoBranches().eval()))
    assert find_plan(injected) is not None
    copied = copy.deepcopy(injected)
    pickled = pickle.loads(pickle.dumps(copied))
    for again in (copied, pickled, copy.deepcopy(pickled)):
        assert find_plan(again) == find_plan(injected)


def test_a_gate_that_was_trained_is_gone(x):
    net = nets.TwoBranches().eval()
    injected = inject(net)
    for block in blocks(injected).values():
        nn.init.normal_(block.fc2.weight)
    assert not torch.equal(injected(x), net(x))
    assert torch.equal(eject(injected)(x), net(x))


def test_a_wrapped_model_is_ejected_inside():
    wrapper = nn.Sequential(inject(nets.TwoBranches()))
    ejected = eject(wrapper)
    assert not blocks(ejected)
    assert find_plan(ejected[0]) is None


def test_a_network_that_was_not_injected_is_refused():
    with pytest.raises(ModelError, match="TwoBranches has not been injected; there is nothing to eject"):
        eject(nets.TwoBranches())


def test_an_owner_whose_class_was_changed_since_is_refused_and_left_alone():
    class Scaled(nets.Residual):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(1, 16, 1, 1))

        def forward(self, x):
            return x + self.gamma * self.branch(x)

    injected = inject(nets.wrap(nn.Sequential(nets.Residual(), Scaled())))
    torch.nn.utils.parametrize.register_parametrization(injected[1][1], "gamma", nn.Identity())
    before = [type(m) for m in injected.modules()]
    with pytest.raises(ModelError, match=r"1\.1 had its class changed since it was injected, to ParametrizedSEScaled"):
        eject(injected, inplace=True)
    assert [type(m) for m in injected.modules()] == before
    assert len(blocks(injected)) == 2
