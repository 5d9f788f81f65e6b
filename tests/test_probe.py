import gc
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from se_inject.calls import Entry
from se_inject.errors import ExampleError, ModelError
from se_inject.planner import make_plan
from se_inject.probe import probe_model
from se_inject.twin import make_twin
from tests import nets


def probed_shape(model, **options):
    return tuple(probe_model(model, **options).visits[Entry("")].calls[0].args[0].shape)


class Spy(nn.Module):
    """Notes what it was run on."""

    def __init__(self):
        super().__init__()
        self.conv = nets.conv(3, 8)
        self.seen = []
        self.steps = 0

    def forward(self, x):
        self.seen.append(type(x))
        self.steps += 1
        return self.conv(x)


def test_the_model_is_never_run():
    seen = []
    model = Spy()
    model.conv.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    probe_model(model)
    assert model.seen == []
    assert model.steps == 0
    assert set(seen) == {FakeTensor}


def test_flags_buffers_and_hooks_stay_as_they_were():
    model = nets.wrap(nets.Residual()).train()
    model[1].bn1.eval()
    flags = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    probe_model(model)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calls_and_merges_are_noted_by_the_module_whose_code_they_are_in():
    visits = probe_model(nets.wrap(nets.Residual())).visits
    assert {str(entry): [m.kind for m in visit.merges] for entry, visit in visits.items() if visit.merges} == {
        "1": ["sum"]
    }
    assert tuple(visits[Entry("1")].calls[0].args[0].shape) == (2, 16, 224, 224)


def test_methods_that_are_entered_from_outside_are_entries_of_their_own():
    visits = probe_model(nets.Split()).visits
    assert [str(entry) for entry, visit in visits.items() if visit.merges] == ["(root).forward_features()"]


def test_modules_that_run_in_train_mode_alone_are_seen():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.extra = nets.conv(3, 16), nets.Residual()

        def forward(self, x):
            x = self.stem(x)
            return (x, self.extra(x)) if self.training else x

    assert Entry("extra") in probe_model(Auxiliary().eval()).visits


def test_the_example_is_found_from_timms_configuration():
    import timm

    assert probed_shape(timm.create_model("inception_v3", aux_logits=False)) == (2, 3, 299, 299)


def test_the_example_is_found_by_trying_usual_sizes():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nets.conv(1, 4), nn.Linear(4 * 32 * 32, 2)

        def forward(self, x):
            return self.head(self.conv(x).flatten(1))

    assert probed_shape(Small()) == (2, 1, 32, 32)


def test_an_example_of_one_image_is_doubled():
    assert probed_shape(nets.TwoBranches(), example=torch.zeros(1, 3, 16, 16)) == (
        2,
        3,
        16,
        16,
    )


def test_an_example_of_the_wrong_shape_is_named():
    with pytest.raises(ExampleError, match=r"does not run on an input of shape \(2, 5, 16, 16\).*give example="):
        probe_model(nets.TwoBranches(), example=torch.zeros(2, 5, 16, 16))


class Rigid(nn.Module):
    """Takes one size, which is none of the usual ones."""

    def __init__(self, conv=nn.Conv2d, dims=2):
        super().__init__()
        self.conv, self.head = conv(1, 4, 3, padding=1), nn.Linear(4 * 20**dims, 2)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


def test_the_example_can_be_a_size_alone():
    with pytest.raises(ExampleError, match=r"shape \(2, 1, 224, 224\).*give example= \(--input-size\)"):
        probe_model(Rigid())
    assert probed_shape(Rigid(), example=20) == (2, 1, 20, 20)
    assert probed_shape(Rigid(nn.Conv1d, 1), example=20) == (2, 1, 20)
    assert probed_shape(Rigid(nn.Conv3d, 3), example=20) == (2, 1, 20, 20, 20)
    with pytest.raises(ExampleError, match="the input size is 0; it must be at least 1"):
        probe_model(Rigid(), example=0)


def test_trying_inputs_makes_no_noise():
    script = (
        "import torch, se_inject; from torch import nn; from tests import nets\n"
        "net = nn.Sequential(nets.conv(1, 16), nets.Residual(), nn.Flatten(), nn.Linear(16 * 32 * 32, 2))\n"
        "assert se_inject.make_plan(net)\n"
        "try: se_inject.inject(net, example=torch.zeros(2, 1, 16, 16))\n"
        "except se_inject.SEInjectError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_an_example_that_is_no_tensor_is_named():
    with pytest.raises(ExampleError, match="example= is a str without a tensor"):
        probe_model(nets.TwoBranches(), example="images")


def test_a_network_without_convolutions_needs_an_example():
    with pytest.raises(ExampleError, match="no convolution to tell"):
        probe_model(nn.Linear(3, 3))


def test_a_twin_takes_no_memory_and_shares_nothing():
    model = nets.wrap(nets.Residual())
    twin = make_twin(model)
    assert all(isinstance(t.data, FakeTensor) for t in (*twin.model.parameters(), *twin.model.buffers()))
    assert not set(map(id, model.modules())) & set(map(id, twin.model.modules()))


def test_a_twin_keeps_tied_weights_tied():
    model = nn.Sequential(nets.conv(8, 8), nets.conv(8, 8))
    model[1].weight = model[0].weight
    twin = make_twin(model)
    assert twin.model[1].weight is twin.model[0].weight


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "wrapped in DataParallel; inject first"),
        (torch.compile, "is compiled; inject first"),
        (lambda model: torch.jit.script(nets.Plain()), "is scripted .*inject first"),
        (lambda model: "resnet50", "found a str; expected a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_wrapped_model_is_refused_with_the_order_to_follow(wrap, message):
    with pytest.raises(ModelError, match=message):
        probe_model(wrap(nets.TwoBranches()))


def test_a_model_compiled_in_place_is_refused():
    model = nets.TwoBranches()
    model.compile()
    with pytest.raises(ModelError, match="is compiled; inject first"):
        probe_model(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_model_is_refused():
    model = nets.TwoBranches()
    model.head = torch.ao.nn.quantized.dynamic.Linear(16, 10)
    with pytest.raises(ModelError, match="head is quantised .*inject first, quantise after"):
        probe_model(model)


def test_a_number_made_of_a_channels_last_map_is_no_map():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            return x * self.norm(x.permute(0, 2, 3, 1)).mean()

    probe_model(Last(), example=torch.zeros(2, 16, 8, 8))


@pytest.mark.parametrize("halve", [lambda x: x.chunk(2, 1)[1], lambda x: torch.split(x, 8, 1)[1], lambda x: x[:, 8:]])
def test_half_a_map_is_laid_out_as_the_whole(halve):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nets.conv(16, 16), nn.Linear(8, 8)

        def forward(self, x):
            last = halve(self.conv(x)).permute(0, 2, 3, 1)
            return torch.cat([last, self.fc(last)], -1)

    visits = probe_model(Last(), example=torch.zeros(2, 16, 6, 6)).visits
    assert [merge.kind for merge in visits[Entry("")].merges] == ["concat"]


def test_one_operand_of_a_concatenation_tells_where_the_channels_are():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return torch.cat([x, self.fc(x)], -1)

    visits = probe_model(Last(), example=torch.zeros(2, 6, 6, 8)).visits
    assert [merge.kind for merge in visits[Entry("")].merges] == ["concat"]


def test_garbage_is_collected_as_before_when_a_plan_is_made():
    for is_enabled in (True, False):
        (gc.enable if is_enabled else gc.disable)()
        try:
            make_plan(nets.TwoBranches())
            with pytest.raises(ModelError):
                make_plan(nn.DataParallel(nets.TwoBranches()))
            assert gc.isenabled() == is_enabled
        finally:
            gc.enable()
