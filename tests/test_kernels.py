"""The operators of a block in evaluation: the plain ones, and the Triton kernels where there is no GPU to run them."""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernels as benchmark
from se_inject import SqueezeExcite, blocks, inject, kernels, load, optimize, save
from se_inject.fused import FusedSqueezeExcite
from tests import nets
from tests.kernel_cases import CASES, GATES, LIMITS, measure, measure_block
from tests.test_optimization import Bottleneck, assert_equal_to_double, train_a_little

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(code, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.check_output([sys.executable, *code], text=True, env=environment, timeout=300)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_operators_are_close_to_double(case):
    assert all(error < LIMITS[case.dtype] for error in measure(case, "cpu").values())


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(run(["-m", "tests.kernel_cases"], TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_close_to_double_in_the_interpreter(case, interpreted):
    errors = interpreted["cases"][str(case)]
    assert all(error < LIMITS[case.dtype] for error in errors.values()), errors


@needs_triton
@pytest.mark.slow
def test_a_block_of_kernels_is_close_to_double_in_the_interpreter(interpreted):
    assert interpreted["block"] < 1e-6
    assert interpreted["nan"]


@needs_gpu
@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_close_to_double_on_a_gpu(case):
    errors = measure(case, "cuda")
    assert all(error < LIMITS[case.dtype] for error in errors.values()), errors


@needs_gpu
@needs_triton
def test_networks_of_kernels_on_a_gpu(resnet, x):
    assert measure_block("cuda") == {"block": pytest.approx(0, abs=1e-6), "nan": True}
    model, x = copy.deepcopy(resnet).cuda(), x.cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_equal_to_double(model, optimize(model, kernels=True), x)
        fast = optimize(model, kernels=True).to(memory_format=torch.channels_last)
        assert_equal_to_double(model, fast, x.contiguous(memory_format=torch.channels_last))


class Compiler:
    """Stands for a kernel: compiles it for what it would be launched with, on a GPU that is not there."""

    def __init__(self, kernel, architecture, compiled):
        self.kernel, self.architecture, self.compiled = kernel, architecture, compiled

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self

    def __call__(self, *args, num_warps=4, **constants):
        from triton import compiler
        from triton.backends.compiler import GPUTarget

        values = dict(zip(self.kernel.arg_names, (*args, *constants.values()), strict=True))
        assert list(values)[len(args) :] == list(constants)
        signature, fixed, hints = {}, {}, {}
        for index, (name, value) in enumerate(values.items()):
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], fixed[index,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[value.dtype]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            is_multiple = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if is_multiple and (index,) not in fixed:
                hints[index,] = [["tt.divisibility", 16]]
        source = compiler.ASTSource(self.kernel, signature, fixed, hints)
        target = GPUTarget("cuda", self.architecture, 32)
        self.compiled.append(compiler.compile(source, target=target, options={"num_warps": num_warps}))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("num", "inner", "size", "architecture"), [(256, 64, 56, 90), (1, 512, 7, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_last", [False, True])
def test_kernels_compile_for_gpus_without_spilling(
    dtype, is_last, num, inner, size, architecture, monkeypatch, tmp_path
):
    """For the first and the last blocks of a ResNet-50, on an H100 and an A100; its maps are not there (`meta`)."""
    from se_inject import triton_kernels

    if triton_kernels.IS_INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = []
    for name in ("_add_up", "_excite", "_scale", "_convolve"):
        monkeypatch.setattr(triton_kernels, name, Compiler(getattr(triton_kernels, name), architecture, compiled))
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    channels, hidden = 4 * inner, inner // 4

    def make(*shape):
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.to(memory_format=memory_format) if len(shape) == 4 else x

    h, y = make(num, inner, size, size), make(num, channels, size, size)
    z, gate, weight, bias = make(num, inner), make(num, channels), make(channels, inner), make(channels)
    triton_kernels.squeeze(h, z)
    layers = (make(hidden, inner), make(hidden), make(channels, hidden), bias)
    triton_kernels.excite(z, *layers, kind="sigmoid", gain=1.0, gate=gate)
    triton_kernels.scale(y, gate, y, relu=True, out=y)
    triton_kernels.convolve(h, weight, bias, gate, y, relu=True, out=y)
    assert {kernel.name for kernel in compiled} == {"_add_up", "_excite", "_scale", "_convolve"}
    for kernel in compiled:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", path], text=True)
        assert " STACK:0 " in usage, (kernel.name, usage)
        assert kernel.metadata.shared <= 99 * 1024, kernel.name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operators_are_what_torch_expects(memory_format):
    h, y = (torch.randn(2, c, 5, 3).contiguous(memory_format=memory_format) for c in (6, 10))
    z, gate, weight, bias = torch.randn(2, 6), torch.randn(2, 10), torch.randn(10, 6), torch.randn(10)
    torch.library.opcheck(kernels.squeeze, (h,))
    for kind in GATES:
        arguments = (z, torch.randn(4, 6), torch.randn(4), torch.randn(10, 4), bias)
        torch.library.opcheck(kernels.excite, arguments, {"kind": kind, "gain": 2.0})
    for shortcut in (None, y.flip(0)):
        torch.library.opcheck(kernels.scale, (y, gate, shortcut), {"relu": True})
        torch.library.opcheck(kernels.convolve, (h, weight, bias, gate, shortcut), {"relu": False})
        torch.library.opcheck(kernels.scale, (y[:, :, ::2], gate, None), {"relu": True})


def test_empty_batches_stay_empty():
    h, gate = torch.randn(0, 6, 5, 3), torch.randn(0, 10)
    assert kernels.squeeze(h).shape == (0, 6)
    assert kernels.convolve(h, torch.randn(10, 6), None, gate, None, relu=True).shape == (0, 10, 5, 3)


def test_wrong_shapes_are_refused():
    y, gate = torch.randn(2, 6, 5, 3), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"gate: found a tensor of shape \(2, 5\); expected \(2, 6\)"):
        kernels.scale(y, gate[:, :5], None, relu=False)
    with pytest.raises(ValueError, match="shortcut: found"):
        kernels.scale(y, gate, y[:1], relu=False)
    with pytest.raises(ValueError, match="weight: found"):
        kernels.convolve(y, torch.randn(6, 5), None, gate, None, relu=False)
    with pytest.raises(ValueError, match="bias2: found"):
        kernels.excite(gate, torch.randn(4, 6), torch.randn(4), torch.randn(8, 4), gate[0], kind="tanh", gain=1.0)


def test_triton_is_imported_when_a_kernel_runs_and_not_before():
    run(
        ["-c", "import sys, se_inject.fused; assert 'se_inject.kernels' in sys.modules and 'triton' not in sys.modules"]
    )


def test_without_triton_the_operators_are_plain():
    code = """
import sys
sys.modules["triton"] = None
import torch
from se_inject import kernels
assert kernels._load_kernels() is None
assert torch.equal(kernels.squeeze(torch.ones(1, 2, 3, 3)), torch.ones(1, 2))
"""
    run(["-c", code], TRITON_INTERPRET="1")


class Watch(TorchDispatchMode):
    """Sees which of our operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "se_inject":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def watch(model, *args, **kwargs):
    with Watch() as seen:
        model(*args, **kwargs)
    return seen.names


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return train_a_little(inject(timm.create_model("resnet26", num_classes=10)))


@pytest.fixture(scope="module")
def fast(resnet):
    return optimize(resnet, kernels=True)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def test_a_network_of_kernels_gives_the_same(resnet, fast, x):
    assert_equal_to_double(resnet, fast, x)
    assert_equal_to_double(resnet, fast, x[:1].contiguous(memory_format=torch.channels_last))
    assert watch(fast, x) == ["squeeze", "excite", "convolve"] * 8
    assert "256, 16, relu, kernels" in repr(fast.layer1[0].se)
    assert all(parameter.is_contiguous() for parameter in fast.parameters())  # as the Triton kernels read them


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["squeeze", "excite", "convolve"]),
        ({"gate": "tanh"}, ["squeeze", "excite", "convolve"]),
        ({"gate": "hard_sigmoid"}, ["squeeze", "excite", "convolve"]),
        ({"bias": False}, ["squeeze", "excite", "convolve"]),
        ({"placement": "conv3x3"}, ["squeeze", "excite", "scale"]),
        ({"squeeze": "max"}, []),
    ],
)
def test_a_bottleneck_of_kernels_gives_the_same(options, names):
    model = train_a_little(inject(nets.wrap(Bottleneck()), r=4, **options))
    optimized = optimize(model, kernels=True)
    x = torch.randn(2, 3, 9, 9)
    assert_equal_to_double(model, optimized, x)
    assert watch(optimized, x) == names
    assert not watch(optimize(model), x)


def make_block(channels=16, **options):
    block = SqueezeExcite(channels, 4, **options)
    nn.init.normal_(block.fc2.weight)
    return block.requires_grad_(False).eval()


def test_where_kernels_do_not_suit_a_block_goes_the_plain_way():
    x, shortcut = torch.randn(2, 16, 6, 6), torch.randn(2, 16, 6, 6)

    def check(block, *args, is_plain=True, **kwargs):
        again = copy.deepcopy(block)
        again.kernels = False
        torch.testing.assert_close(block(*args, **kwargs), again(*args, **kwargs))
        assert (watch(block, *args, **kwargs) == []) == is_plain

    def fuse(block, **options):
        return FusedSqueezeExcite(block, kernels=True, **options)

    block = fuse(make_block())
    check(block, x, is_plain=False)
    check(block, x, shortcut=shortcut, is_plain=False)
    check(block, x[:, :8], x[:, 8:])
    check(block, x, shortcut=shortcut[:1])
    check(block, x.requires_grad_(), shortcut=shortcut)
    with torch.no_grad():
        check(block, x, shortcut=shortcut, is_plain=False)
    x.requires_grad_(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        check(block, x.bfloat16())
    check(fuse(make_block(channel_dim=-1)), torch.randn(2, 6, 6, 16))
    check(fuse(make_block(num_spatial=1)), torch.randn(2, 16, 6))
    check(fuse(make_block(num_spatial=3)), torch.randn(2, 16, 2, 3, 3))
    check(fuse(make_block(squeeze="max")), x)
    for groups in (1, 2):
        convolution = nn.Conv2d(8, 16, 1, groups=groups).requires_grad_(False)
        check(fuse(make_block(), convolution=convolution), x[:, :8], is_plain=groups > 1)
    seen = []
    block.fc1.register_forward_hook(lambda *args: seen.append(args))
    check(block, x)
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own use of it
def test_transforms_see_through_a_block():
    block = FusedSqueezeExcite(make_block(), kernels=True)
    x = torch.randn(2, 16, 6, 6)
    plain = copy.deepcopy(block)
    plain.kernels = False
    for found, expected in zip(*(torch.func.jvp(b, (x,), (x.flip(0),)) for b in (block, plain)), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.vmap(block)(x[:, None]), block(x)[:, None])


def test_copies_pickles_and_artifacts_keep_the_choice(resnet, fast, x, tmp_path):
    save(fast, tmp_path / "fast.pt")
    save(optimize(resnet), tmp_path / "plain.pt")
    with torch.no_grad():
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), load(tmp_path / "fast.pt")):
            assert all(block.kernels for block in blocks(again).values())
            assert torch.equal(again(x), fast(x))
    assert not any(block.kernels for block in blocks(load(tmp_path / "plain.pt")).values())


def test_torch_compile_and_export_keep_the_operators(fast, x):
    with torch.no_grad():
        expected = fast(x)
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(last), expected, rtol=1e-4, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},))
        assert program.graph_module.code.count("se_inject.convolve") == 8
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
        assert program.module()(torch.cat([x, x]))[:2].shape == expected.shape


def test_the_benchmark_measures_what_it_says(monkeypatch):
    for step in benchmark.make_steps(2, 32, 5, device="cpu", dtype=torch.float32).values():
        assert all(error < 1e-6 for error in benchmark.measure_errors(step).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernels"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        benchmark.main()
