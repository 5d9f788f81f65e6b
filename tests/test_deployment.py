"""What is written does what the network does, runs without its code, and is there whole or not at all."""

import contextlib
import copy
import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from se_inject import blocks, deployment, inject, load, optimize, save
from se_inject.calls import Call
from se_inject.deployment import deploy
from se_inject.errors import ArtifactError, ExampleError, ExportError, ModelError, OptionError
from se_inject.trials import compare_outputs
from tests import nets
from tests.test_cli import failure, run  # noqa: F401
from tests.test_optimization import Bottleneck, train_a_little

SIZE = 64
PROGRAMS = [".pt2", ".onnx"]


def open_program(path):
    """Read a program as somebody does who has no se-inject: a function from tensors to a list of tensors."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda *args, **kwargs: [x for x in tree_leaves(module(*args, **kwargs)) if x is not None]

    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]

    def run_it(*args, **kwargs):
        tensors = [x.numpy() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run_it


def assert_close(program, model, *args, **kwargs):
    with torch.no_grad():
        found, expected = program(*args, **kwargs), model(*args, **kwargs)
    expected = [x for x in tree_leaves(expected) if isinstance(x, torch.Tensor)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        # Relative to the largest output: other kernels add in another order.
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10)
    return train_a_little(inject(net, r=8, example=torch.zeros(2, 3, SIZE, SIZE)))


@pytest.fixture(scope="module")
def file(resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("deployment") / "model.pt"
    save(resnet, path)
    return path


@pytest.mark.parametrize("suffix", PROGRAMS)
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", ["basic blocks", "bottleneck"])
def test_a_program_takes_any_number_of_images(name, optimized, suffix, resnet, tmp_path):
    path = tmp_path / f"fast{suffix}"
    model = resnet if name == "basic blocks" else train_a_little(inject(nets.wrap(Bottleneck()), r=4))
    written = deploy(model, path, optimized=optimized, input_size=48)
    assert (written.batch, written.inputs, written.notes) == ("dynamic", (("N", 3, 48, 48),), ())
    assert written.difference < 1e-5
    network = optimize(model) if optimized else model
    assert written.num_parameters == sum(p.numel() for p in network.parameters())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    program = open_program(path)
    for num in (1, 5):
        assert_close(program, model, torch.randn(num, 3, 48, 48))


@pytest.mark.slow
def test_a_whole_network_is_written_at_the_size_of_its_injection(tmp_path):
    net = timm.create_model("resnet18", num_classes=10)
    model = train_a_little(inject(net, example=torch.zeros(2, 3, SIZE, SIZE)))
    assert deploy(model, tmp_path / "fast.onnx", optimized=True).inputs == (("N", 3, SIZE, SIZE),)
    for num in (1, 5):
        assert_close(open_program(tmp_path / "fast.onnx"), model, torch.randn(num, 3, SIZE, SIZE))


class Halving(nn.Module):
    """Halves its map twice and doubles it again: a sum that fits for multiples of 4 alone."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 8, 2, 2))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2))

    def forward(self, x):
        return x + self.up(self.down(x))


class Flattening(nn.Module):
    """Has a classifier for one size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x):
        return self.head((x + self.body(x)).flatten(1))


def torch_leaves_odd_sizes_open():
    """Export a pooling on an even size and try it on an odd one, which torch 2.9 guards against."""
    sizes = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    exported = torch.export.export(nn.MaxPool2d(3, 2, 1), (torch.zeros(2, 3, 64, 96),), dynamic_shapes=(sizes,))
    try:
        exported.module()(torch.zeros(2, 3, 63, 95))
    except (AssertionError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("suffix", PROGRAMS)
@pytest.mark.parametrize("optimized", [False, True])
def test_a_program_takes_images_of_any_size(optimized, suffix, resnet, tmp_path):
    path = tmp_path / f"fast{suffix}"
    written = deploy(resnet, path, optimized=optimized, dynamic_size=True)
    if suffix == ".pt2" and not torch_leaves_odd_sizes_open():
        assert (written.inputs, written.size) == ((("N", 3, SIZE, SIZE),), "fixed")
        assert [note.partition(": ")[0] for note in written.notes] == ["the size is fixed, for it cannot be left open"]
        return
    assert (written.inputs, written.size) == ((("N", 3, "H", "W"),), "dynamic")
    # torch takes a last map of one pixel, as images of 32 have, for a constant, and says so.
    expected = ["much smaller images than those of the injection are refused"] if suffix == ".pt2" else []
    assert [note.partition(": ")[0] for note in written.notes] == expected
    program = open_program(path)
    for num, height, width in ((1, SIZE, SIZE), (2, 65, 130), (3, 96, 40)):
        assert_close(program, resnet, torch.randn(num, 3, height, width))


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_program_takes_the_sizes_that_the_network_takes(suffix, tmp_path):
    model = train_a_little(inject(Halving(), example=torch.zeros(2, 3, 64, 64)))
    written = deploy(model, tmp_path / f"x{suffix}", dynamic_size=True)
    assert (written.inputs, written.notes) == ((("N", 3, "H", "W"),), ())
    program = open_program(tmp_path / f"x{suffix}")
    assert_close(program, model, torch.randn(2, 3, 32, 100))
    for run_it in (model, program):
        with pytest.raises(Exception, match=r"(?i)size|shape|dim|guard|broadcast|equal"):
            run_it(torch.randn(1, 3, 33, 32))


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_size_that_cannot_be_left_open_is_fixed(suffix, tmp_path):
    model = train_a_little(inject(Flattening(), example=torch.zeros(2, 3, 16, 16)))
    written = deploy(model, tmp_path / f"x{suffix}", dynamic_size=True)
    assert (written.inputs, written.size, written.batch) == ((("N", 3, 16, 16),), "fixed", "dynamic")
    assert [note.partition(": ")[0] for note in written.notes] == ["the size is fixed, for it cannot be left open"]
    assert_close(open_program(tmp_path / f"x{suffix}"), model, torch.randn(5, 3, 16, 16))


class Threshold(nn.Module):
    """Does something else with images from some size on."""

    def __init__(self, dim, size):
        super().__init__()
        self.dim, self.size = dim, size
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = torch.relu(x + self.body(x))
        return y * 3 if x.shape[self.dim] < self.size else y


@pytest.mark.parametrize(("dim", "size"), [(2, 20), (3, 31), (2, 150)])
def test_a_program_that_holds_for_some_sizes_says_so_or_is_fixed(dim, size, tmp_path):
    model = train_a_little(inject(Threshold(dim, size), example=torch.zeros(2, 3, 32, 32)))
    assert deploy(model, tmp_path / "x.onnx", dynamic_size=True).size == "fixed"  # it would not refuse the others
    written = deploy(model, tmp_path / "x.pt2", dynamic_size=True)
    assert written.size == "dynamic"
    assert "are refused: " in written.notes[0]
    program, taken = open_program(tmp_path / "x.pt2"), []
    for x in (torch.randn(1, 3, size - 1, size - 1), torch.randn(1, 3, size, size)):
        with contextlib.suppress(AssertionError):
            taken.append((program(x), model(x)))
    [([output], expected)] = taken
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("dims", "letters"), [(1, ("L",)), (3, ("D", "H", "W"))])
def test_signals_and_volumes_are_left_open_too(dims, letters, tmp_path):
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = kind(3, 3, 3, padding=1)

        def forward(self, x):
            return x + self.body(x)

    model = train_a_little(inject(Net(), example=torch.zeros(2, 3, *[12] * dims)))
    written = deploy(model, tmp_path / "x.pt2", dynamic_size=True)
    assert written.inputs == (("N", 3, *letters),)
    assert_close(open_program(tmp_path / "x.pt2"), model, torch.randn(1, 3, *range(9, 9 + dims)))


def test_an_onnx_file_names_its_sizes(resnet, tmp_path):
    import onnxruntime

    deploy(resnet, tmp_path / "model.onnx", dynamic_size=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [x.shape for x in session.get_inputs()] == [["batch", 3, "height", "width"]]
    assert [x.shape for x in session.get_outputs()] == [["batch", 10]]


def test_an_onnx_file_names_its_output_and_its_batch(tmp_path):
    import onnxruntime

    deploy(inject(nets.TwoBranches()), tmp_path / "model.onnx", input_size=16)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("x", ["batch", 3, 16, 16])]
    assert [(x.name, x.shape) for x in session.get_outputs()] == [("output", ["batch", 10])]


def test_a_program_runs_where_there_is_no_se_inject(tmp_path):
    model = train_a_little(inject(nets.wrap(nets.Residual()), example=torch.zeros(2, 3, 16, 16)))
    deploy(model, tmp_path / "fast.pt2", optimized=True)
    x = torch.randn(5, 3, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['se_inject'] = None; "
        "torch.save(torch.export.load('fast.pt2').module()(torch.load('x.pt')), 'y.pt')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=120)
    assert_close(lambda x: [torch.load(tmp_path / "y.pt")], model, x)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_program_has_no_operators_of_ours(suffix, tmp_path):
    model = train_a_little(inject(nets.wrap(Bottleneck()), r=4))
    fast = optimize(model, kernels=True)
    deploy(fast, tmp_path / f"fast{suffix}", input_size=16)
    assert_close(open_program(tmp_path / f"fast{suffix}"), model, torch.randn(5, 3, 16, 16))
    assert all(block.kernels for block in blocks(fast).values())
    if suffix == ".pt2":
        nodes = torch.export.load(tmp_path / "fast.pt2").graph.nodes
        assert not any("se_inject" in str(node.target) for node in nodes)


def test_an_artifact_is_optimized(resnet, tmp_path):
    written = deploy(resnet, tmp_path / "fast.pt", optimized=True)
    assert (written.format, written.batch, written.inputs) == ("artifact", "dynamic", ())
    assert written.difference < 1e-5
    again, x = load(tmp_path / "fast.pt"), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(again(x), optimize(resnet)(x))


def test_the_model_is_left_as_it_was(tmp_path):
    model = inject(nets.wrap(nets.ResidualInPlace())).train()
    model[1].bn1.eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    deploy(model, tmp_path / "fast.pt2", optimized=True, input_size=16)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimized_network_and_a_plain_one_are_written_too(tmp_path):
    plain = train_a_little(nets.wrap(nets.Residual()))
    x = torch.randn(5, 3, 24, 24)
    for model in (plain, optimize(plain), optimize(train_a_little(inject(plain)))):
        path = tmp_path / "model.pt2"
        assert deploy(model, path, input_size=24).inputs == (("N", 3, 24, 24),)
        assert_close(open_program(path), model, x)


def test_types_stay_and_get_a_tolerance_of_their_own(tmp_path):
    model = train_a_little(inject(nets.TwoBranches())).bfloat16()
    assert deploy(model, tmp_path / "fast.pt2", optimized=True, input_size=16).difference < 0.05
    assert open_program(tmp_path / "fast.pt2")(torch.zeros(1, 3, 16, 16).bfloat16())[0].dtype is torch.bfloat16


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)


class Baked(Head):
    """torch says that the batch is a constant."""

    def forward(self, x):
        return self.conv(x).reshape(2, -1)


class Branching(Head):
    """torch says nothing, and takes the branch of the example for all batches."""

    def forward(self, x):
        out = self.conv(x)
        return out * 2 if x.shape[0] > 1 else out


@pytest.mark.parametrize("suffix", PROGRAMS)
@pytest.mark.parametrize(
    ("net", "reason"), [(Baked, "Constraints violated"), (Branching, r"outputs differ by .* of shape \(1, 3, 8, 8\)")]
)
def test_a_batch_that_cannot_be_left_open_is_fixed(net, reason, suffix, tmp_path):
    path, model = tmp_path / f"model{suffix}", net().eval()
    written = deploy(model, path, input_size=8)
    assert (written.batch, written.inputs) == ("fixed", ((1, 3, 8, 8),))
    (note,) = written.notes
    assert re.search(f"the batch is fixed, for it cannot be left open: .*{reason}", note)
    assert_close(open_program(path), model, torch.randn(1, 3, 8, 8))
    assert deploy(model, path, example=torch.zeros(4, 3, 8, 8)).inputs == ((4, 3, 8, 8),)
    assert_close(open_program(path), model, torch.randn(4, 3, 8, 8))


class Several(Head):
    """Two inputs and a constant, by position and by name; outputs in a dict, one of them None."""

    def forward(self, x, factor=1, *, offset):
        return {"maps": self.conv(x) * factor + offset, "nothing": None, "means": [x.mean((2, 3))]}


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_several_inputs_and_outputs(suffix, tmp_path):
    path, model = tmp_path / f"model{suffix}", Several().eval()
    written = deploy(model, path, example={"x": torch.zeros(2, 3, 8, 8), "offset": torch.zeros(2, 8, 1, 1)})
    assert (written.batch, written.inputs) == ("dynamic", (("N", 3, 8, 8), ("N", 8, 1, 1)))
    assert_close(open_program(path), model, x=torch.randn(5, 3, 8, 8), offset=torch.randn(5, 8, 1, 1))
    written = deploy(model, path, example={"x": torch.zeros(2, 3, 8, 8), "factor": 3, "offset": torch.zeros(6, 6)})
    assert written.inputs == ((2, 3, 8, 8), (6, 6))
    assert "its inputs differ in their first dimension" in written.notes[0]
    with torch.no_grad():
        x, offset = torch.randn(2, 3, 8, 8), torch.randn(6, 6)
        expected = model(x, 3, offset=offset)["maps"]
    given = {"factor": 3} if suffix == ".pt2" else {}
    torch.testing.assert_close(open_program(path)(x=x, **given, offset=offset)[0], expected)


class DataDependent(Head):
    def forward(self, x):
        out = self.conv(x)
        return out * 2 if out.sum() > 0 else out


class WithoutOnnx(Head):
    def forward(self, x):
        return torch.special.bessel_j0(self.conv(x))


@pytest.mark.parametrize(
    ("net", "suffix", "message"),
    [
        (
            DataDependent,
            ".pt2",
            r"DataDependent cannot be written as \.pt2: Could not guard on data-dependent expression",
        ),
        (DataDependent, ".onnx", r"DataDependent cannot be written as \.onnx: Could not guard on"),
        (WithoutOnnx, ".onnx", r"No ONNX function found for .*bessel_j0"),
    ],
)
def test_what_cannot_be_written_says_why_and_nothing_else(net, suffix, message, tmp_path, capfd):
    path = tmp_path / f"model{suffix}"
    path.write_text("what was there")
    with pytest.raises(ExportError, match=message) as error:
        deploy(net().eval(), path, input_size=8)
    assert "\n" not in str(error.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was there"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_what_does_something_else_is_not_written(suffix, resnet, tmp_path, monkeypatch):
    def spoil(model, example):
        optimized = optimize(model, example)
        optimized.fc.bias += 0.001 * optimized.fc.bias.abs().max()
        return optimized

    monkeypatch.setattr(deployment, "optimize", spoil)
    with pytest.raises(ExportError, match=r"outputs differ by .* of the largest on an input of shape \("):
        deploy(resnet, tmp_path / f"fast{suffix}", optimized=True)
    assert not list(tmp_path.iterdir())


class Wrapped(nn.Module):
    """Gives its scores in an object that torch's pytrees do not know, or changed."""

    def __init__(self, change=lambda y: SimpleNamespace(scores=y)):
        super().__init__()
        self.body, self.change = Bottleneck(), change

    def forward(self, x):
        return self.change(self.body(x))


def test_outputs_in_objects_are_compared_too():
    x = Call((torch.randn(2, 16, 8, 8),), {})
    net = Wrapped().eval()
    other = copy.deepcopy(net)
    assert compare_outputs(other, net, [x]) == 0
    next(other.parameters()).data *= 1.1
    with pytest.raises(ExportError, match="outputs differ by"):
        compare_outputs(other, net, [x])


def test_the_imaginary_part_is_compared_too():
    x = Call((torch.randn(2, 16, 8, 8),), {})
    net, other = Wrapped(lambda y: torch.complex(y, y)).eval(), Wrapped(lambda y: torch.complex(y, 2 * y)).eval()
    other.body = net.body
    with pytest.raises(ExportError, match="outputs differ by"):
        compare_outputs(other, net, [x])


def test_what_is_infinite_or_no_number_in_both_is_the_same():
    def mask(value):
        return Wrapped(lambda y: y.masked_fill(torch.arange(y.shape[1])[:, None, None] == 3, value)).eval()

    x = Call((torch.randn(2, 16, 8, 8),), {})
    net, other, third = mask(-torch.inf), mask(-torch.inf), mask(torch.inf)
    other.body = third.body = net.body
    assert compare_outputs(other, net, [x]) == 0
    with pytest.raises(ExportError, match="outputs differ by inf"):
        compare_outputs(third, net, [x])


@pytest.mark.parametrize("change", [lambda y: y * torch.nan, lambda y: 1.0])
def test_a_network_that_gives_no_numbers_is_not_compared(change):
    net = Wrapped(change).eval()
    with pytest.raises(ExportError, match=r"Wrapped gives no numbers on an input of shape .* that could be compared"):
        compare_outputs(net, net, [Call((torch.randn(2, 16, 8, 8),), {})])


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_its_packages_onnx_is_refused_before_any_work(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(deployment, "copy_model", None)
    with pytest.raises(ExportError, match=rf"ONNX needs {package}, .*; run: pip install 'se-inject\[onnx\]'"):
        deploy(nets.Plain(), tmp_path / "model.onnx")


@pytest.mark.parametrize("net", [nets.TwoBranches, Branching])
def test_without_onnxruntime_the_file_is_written_and_said_not_to_have_been_run(net, tmp_path, monkeypatch):
    path, model = tmp_path / "model.onnx", net().eval()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "onnxruntime", None)
        written = deploy(model, path, input_size=8)
    assert (written.difference, written.batch) == (None, "fixed" if net is Branching else "dynamic")
    assert "was not run, for onnxruntime is not installed; pip install 'se-inject[onnx]'" in written.notes[-1]
    assert str(written).endswith("; it was not run")
    assert_close(open_program(path), model, torch.randn(1, 3, 8, 8))


def test_onnx_does_not_hold_more_than_two_gigabytes(tmp_path):
    with pytest.raises(ExportError, match=r"Linear has 2\.5 GB of weights, .* holds 2 GB; write \.pt2"):
        deploy(nn.Linear(25_000, 25_000, device="meta"), tmp_path / "model.onnx")


def test_what_cannot_be_deployed_says_why(resnet, tmp_path):
    path = tmp_path / "fast.pt2"
    with pytest.raises(ModelError, match="ResNet is optimized already; leave out --optimize"):
        deploy(optimize(resnet), path, optimized=True)
    with pytest.raises(ModelError, match=r"Plain has no blocks, which .*fast\.pt is for; inject first, or write \.pt2"):
        deploy(nets.Plain(), tmp_path / "fast.pt", optimized=True)
    with pytest.raises(ExampleError, match=r"ResNet does not run on an input of shape \(2, 7, 8, 8\): .*--input-size"):
        deploy(resnet, path, example=torch.zeros(1, 7, 8, 8))
    with pytest.raises(ExampleError, match="has no convolution to tell its input channels; give example="):
        deploy(nn.Linear(2, 2), path)
    with pytest.raises(OptionError, match="the input size is 0; it goes with images .* and must be at least 1"):
        deploy(resnet, path, input_size=0)
    with pytest.raises(OptionError, match="the input size is 9; it goes with images"):
        deploy(nn.Linear(2, 2), path, example=torch.zeros(2, 2), input_size=9)
    with pytest.raises(ArtifactError, match=r"expected one of \.pt2, \.onnx, \.pt, \.pth, \.safetensors"):
        deploy(resnet, tmp_path / "fast.bin")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_program(run, file, resnet, tmp_path):  # noqa: F811
    code, out, err = run("export", file, "--optimize", "--out", "fast.onnx")
    assert code == 0
    assert re.fullmatch(
        r"fast\.onnx: [\d,]+ parameters, input \(N, 3, 64, 64\); outputs differ by [-e.\d]+ of the largest\n", out
    )
    assert len(err.splitlines()) == 1  # where the network comes from
    assert_close(open_program(tmp_path / "fast.onnx"), resnet, torch.randn(5, 3, SIZE, SIZE))


def test_the_command_names_the_file_itself_and_speaks_json(run, file, resnet, tmp_path):  # noqa: F811
    code, out, _ = run("export", file, "--input-size", "32", "--json")
    values = json.loads(out)
    assert code == 0
    assert values.pop("difference") < 1e-5
    assert values == {
        "out": "model.pt2",
        "format": "torch.export",
        "batch": "dynamic",
        "size": "fixed",
        "inputs": [["N", 3, 32, 32]],
        "parameters": sum(p.numel() for p in resnet.parameters()),
        "notes": [],
    }
    assert_close(open_program(tmp_path / "model.pt2"), resnet, torch.randn(1, 3, 32, 32))
    _, out, _ = run(
        "export", "test_resnet", "--no-pretrained", "--optimize", "--num-classes", "3", "--input-size", "32"
    )
    assert out.startswith("fast.pt2: ")
    assert open_program(tmp_path / "fast.pt2")(torch.zeros(1, 3, 32, 32))[0].shape == (1, 3)


def test_the_command_writes_an_optimized_artifact(run, file, resnet):  # noqa: F811
    code, out, _ = run("export", file, "--optimize", "--out", "fast.safetensors")
    assert (code, out.split(":")[0]) == (0, "fast.safetensors")
    assert all(type(block).__name__ == "FusedSqueezeExcite" for block in blocks(load("fast.safetensors")).values())
    assert run("export", "fast.safetensors", "--out", "fast.pt2")[0] == 0
    assert_close(open_program(Path("fast.pt2")), resnet, torch.randn(1, 3, SIZE, SIZE))
    assert "leave out --optimize" in failure(run("export", "fast.safetensors", "--optimize"))


def test_the_command_says_that_a_batch_is_fixed(run, tmp_path):  # noqa: F811
    (tmp_path / "of_mine.py").write_text("from tests.test_deployment import Baked as build\n")
    code, out, err = run("export", "of_mine:build", "--input-size", "8")
    assert (code, out.split(";")[0]) == (0, "model.pt2: 224 parameters, input (1, 3, 8, 8)")
    assert "the batch is fixed, for it cannot be left open: Constraints violated" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optimize", "--to", "timm:seresnet18"], "--to writes timm's network, and --optimize has no part in it"),
        (["--input-size", "64", "--to", "timm:seresnet18"], "and --input-size has no part in it; leave out one"),
        (["--to", "timm:seresnet18", "--out", "a.onnx"], "a.onnx has the suffix '.onnx'; expected one of .pt, .pth"),
        (["--out", "a.pt"], "a.pt would hold the same network again; give --optimize, --to timm:NAME, or a program"),
        (["--optimize", "--out", "a.bin"], "expected one of .pt2, .onnx, .pt, .pth, .safetensors"),
        (["--optimize", "--out", "none/a.pt2"], "there is no folder none"),
    ],
)
def test_bad_options_get_one_line_before_the_network_is_opened(run, tmp_path, args, message):  # noqa: F811
    assert message in failure(run("export", "none.pt", *args))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["test_resnet", "--no-pretrained", "--optimize", "--out", "a.pt"], "ResNet has no blocks, which a.pt is for"),
        (["test_resnet", "--no-pretrained", "--input-size", "0"], "the input size is 0"),
    ],
)
def test_a_network_of_the_wrong_kind_gets_one_line(run, tmp_path, args, message):  # noqa: F811
    assert message in failure(run("export", *args))
    assert not list(tmp_path.iterdir())


def test_the_docstrings_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(deployment)
    assert (results.attempted, results.failed) == (3, 0)
