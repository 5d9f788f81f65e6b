"""What people do with a network afterwards works on the result, and gives the same outputs."""

import copy

import pytest
import timm
import torch
from torch import nn

from se_inject import blocks, inject
from tests import nets
from tests.ranks import run_in_two


@pytest.fixture(scope="module")
def trained():
    """An injected ResNet-18 whose gates are no longer one."""
    torch.manual_seed(0)
    model = inject(nets.enliven(timm.create_model("resnet18", num_classes=10))).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_gates_matter(trained, x):
    again = copy.deepcopy(trained)
    for block in blocks(again).values():
        nn.init.zeros_(block.fc2.weight)
    assert not torch.allclose(again(x), trained(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "net", [nets.TwoBranches, lambda: nets.wrap(nets.Dense()), lambda: nets.wrap(nets.SumOfThree())]
)
def test_compile_makes_one_graph_without_a_break(net):
    injected = inject(net()).eval()
    for block in blocks(injected).values():
        nn.init.normal_(block.fc2.weight)
    x = torch.randn(2, 3, 16, 16)
    report = torch._dynamo.explain(injected)(x)
    assert report.graph_count == 1
    assert report.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(injected, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), injected(x))
    compiled.train()(x).sum().backward()
    assert all(p.grad is not None for block in blocks(injected).values() for p in block.parameters())


@pytest.mark.filterwarnings("ignore")
def test_compile_with_inductor(trained, x):
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(trained), fullgraph=True)
        torch.testing.assert_close(compiled(x), trained(x), rtol=1e-4, atol=1e-4)  # inductor reorders sums


@pytest.mark.filterwarnings("ignore")
def test_export(trained, x):
    program = torch.export.export(trained, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), trained(x))
        five = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(program.module()(five), trained(five))


@pytest.mark.filterwarnings("ignore")
def test_onnx(trained, x, tmp_path):
    import onnxruntime

    torch.onnx.export(trained, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), trained(x), rtol=1e-4, atol=1e-4)  # other kernels


def test_ddp_over_gloo_gives_the_gradients_of_one_process(tmp_path):
    script = """
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from se_inject import blocks, inject
        from se_inject.errors import ModelError
        from tests import nets

        model = inject(nets.TwoBranches())
        for block in blocks(model).values():
            nn.init.normal_(block.fc2.weight)
        x = torch.randn(4, 3, 8, 8)
        ddp = DistributedDataParallel(model)
        try:
            inject(ddp)
            raise SystemExit("a wrapped model was accepted")
        except ModelError as error:
            assert "wrapped in DistributedDataParallel; inject first" in str(error)
        loss = ddp(x[rank * 2 : rank * 2 + 2]).square().mean()
        loss.backward()
        if rank == 0:
            found = {name: p.grad.clone() for name, p in model.named_parameters()}
            model.zero_grad()
            model(x).square().mean().backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)  # sums in another order
            assert any(".fc1." in name or name.startswith("se") for name in found)
        """
    run_in_two(script, tmp_path)


def test_sharded_networks_are_refused(tmp_path):
    script = """
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        from se_inject import eject, inject, make_plan, optimize, save, save_adapter, standardize
        from se_inject.errors import SEInjectError
        from tests import nets

        mesh = init_device_mesh("cpu", (2,))
        plain, injected = nets.TwoBranches(), inject(nets.TwoBranches())
        for model in (plain, injected):
            fully_shard(model, mesh=mesh)
        attempts = [
            (plain, make_plan, "sharded"),
            (plain, inject, "sharded"),
            (plain, lambda model: inject(model, inplace=True), "sharded"),
            (injected, optimize, "cannot be copied"),
            (injected, eject, "cannot be copied"),
            (injected, standardize, "cannot be copied"),
            (injected, lambda model: save(model, "model.pt"), "DTensor"),
            (injected, lambda model: save_adapter(model, "adapter.pt"), "DTensor"),
        ]
        for model, attempt, reason in attempts:
            try:
                attempt(model)
                raise SystemExit("a sharded network was accepted")
            except SEInjectError as error:
                assert reason in str(error), error
        """
    run_in_two(script, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_moving_averages_of_timm(trained, x):
    from timm.utils import ModelEmaV2, ModelEmaV3

    model = copy.deepcopy(trained)
    for average in (ModelEmaV2(model, decay=0.5), ModelEmaV3(model, decay=0.5)):
        with torch.no_grad():
            assert torch.equal(average.module(x), trained(x))
        for block in blocks(model).values():
            nn.init.ones_(block.fc2.weight)
        before = {path: block.fc2.weight.clone() for path, block in blocks(average.module).items()}
        average.update(model)
        for path, block in blocks(average.module).items():
            assert not torch.equal(block.fc2.weight, before[path])
        for path, block in blocks(model).items():
            block.load_state_dict(trained.get_submodule(path).state_dict())


def test_device_and_type_can_be_changed(trained, x):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        reference = trained(x)
        torch.testing.assert_close(model.double()(x.double()).float(), reference, rtol=1e-3, atol=1e-3)
        assert torch.equal(model.float()(x), reference)
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        # Eight bits of mantissa through eighteen layers.
        torch.testing.assert_close(half.float(), reference, rtol=0.1, atol=0.1 * reference.abs().max().item())
    meta = copy.deepcopy(trained).to("meta")
    assert meta(x.to("meta")).shape == (2, 10)


def test_under_autocast_a_fresh_injection_changes_nothing(x):
    model = nets.enliven(timm.create_model("resnet18", num_classes=10)).eval()
    injected = inject(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(x), injected(x))
    for net in (model, injected):
        net.train()
    with torch.autocast("cpu", torch.bfloat16):
        left, right = model(x), injected(x)
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
    right.float().sum().backward()
    assert all(block.fc2.weight.grad.any() for block in blocks(injected).values())


def test_features_can_be_extracted_by_torchvision(trained, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(trained, ["layer2", "layer4"])
    with torch.no_grad():
        found = extractor(x)
        expected = trained.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(found["layer2"], expected[2])
    assert torch.equal(found["layer4"], expected[4])


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_torchscript_traces_it_and_warns_of_nothing(trained, x):
    traced = torch.jit.trace(trained, x)
    with torch.no_grad():
        assert torch.equal(traced(x), trained(x))
        other = torch.randn(5, 3, 96, 64)
        assert torch.equal(traced(other), trained(other))
    traced(x).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())
    trained.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_torchscript_does_not_compile_it(trained):
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="variable number of arguments"):
        torch.jit.script(trained)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(x):
    model = timm.create_model("resnet18", num_classes=10).cuda().eval()
    injected = inject(model)
    assert {p.device.type for p in injected.parameters()} == {"cuda"}
    with torch.no_grad():
        assert torch.equal(model(x.cuda()), injected(x.cuda()))
