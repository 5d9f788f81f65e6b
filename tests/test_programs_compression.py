"""Pruning and quantisation of an injected network by torch-pruning, torchao and torch itself."""

import copy

import pytest
import timm
import torch
import torch_pruning
import torchvision
from packaging.version import Version
from torch import nn

from se_inject import blocks, eject, inject, load, optimize, save
from se_inject.errors import ArtifactError
from tests import nets

X = (2, 3, 64, 64)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]
TORCHAO = pytest.mark.filterwarnings("ignore::UserWarning")  # 0.15 warns of torch 2.9's settings, and of poolings
QUANTISED_TENSORS = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning")  # torch's own use


def make_original(name="resnet18"):
    return nets.enliven(timm.create_model(name, num_classes=10)).eval()


def make_squeezenet():
    return nets.enliven(torchvision.models.squeezenet1_1(num_classes=10)).eval()


def make_tuned(original=None, **options):
    model = inject(make_original() if original is None else original, **options).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight, std=0.5)
    return model


def prune(model, ratio=0.5):
    """Take out the channels of the smallest weights, and all that depends on them."""
    outputs = {m for m in model.modules() if 10 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))}
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    torch_pruning.pruner.MagnitudePruner(
        model, torch.randn(X), importance=importance, pruning_ratio=ratio, ignored_layers=list(outputs)
    ).step()
    return model


def assert_close_enough(found, expected, share):
    """Eight bits leave an error that is a small share of the largest output."""
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_pruned_with_their_maps(training):
    model = prune(make_tuned().train(training))
    owners = {path: model.get_submodule(path.rpartition(".")[0]) for path in blocks(model)}
    assert len(owners) == 8
    for path, block in blocks(model).items():
        channels = owners[path].bn2.num_features
        assert channels == {"1": 32, "2": 64, "3": 128, "4": 256}[path[5]]
        assert block.fc1.weight.shape[1] == block.fc2.weight.shape[0] == channels
        assert (block.channels, repr(block)) == (channels, f"SqueezeExcite({channels}, 16)")
    model(torch.randn(X)).square().mean().backward()
    assert all(block.fc1.weight.grad.any() for block in blocks(model).values())


def test_pruning_takes_the_same_channels_out_of_a_fresh_injection_as_out_of_the_original():
    original = make_original()
    injected = prune(inject(original))
    pruned = prune(copy.deepcopy(original))
    assert injected.conv1.out_channels == pruned.conv1.out_channels == 32
    assert [p.shape for p in eject(injected).parameters()] == [p.shape for p in pruned.parameters()]


def test_a_pruned_network_is_kept_as_a_module_and_can_be_optimized(tmp_path):
    model = prune(make_tuned()).eval()
    x = torch.randn(X)
    with torch.no_grad():
        torch.save(model, tmp_path / "whole.pt")
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), model(x))
        torch.testing.assert_close(optimize(model, example=x)(x), model(x), rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="is of another network: .* tensors differ in name, shape or type"):
        load(tmp_path / "model.pt", base=make_original)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning")  # ConvNeXt's layer scales
@pytest.mark.parametrize(
    ("make", "options", "channels"),
    [
        (lambda: make_original("mobilenetv1_100"), {}, 512),
        (lambda: make_original("convnext_atto"), {}, 160),
        (make_squeezenet, {"concat": "separate"}, 128),
        (make_squeezenet, {"placement": "post"}, 256),
    ],
    ids=["at layers", "convnext", "separate", "post"],
)
def test_other_places_are_pruned_too(make, options, channels):
    model = prune(make_tuned(make(), **options))
    assert [*blocks(model).values()][-1].channels == channels
    assert model(torch.randn(X)).isfinite().all()


@TORCHAO
def test_torchao_quantises_the_weights_alone(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    original = make_original("convnext_atto")
    fresh, tuned = inject(original), make_tuned(original)
    x = torch.randn(X)
    with torch.no_grad():
        expected = tuned(x)
        for model in (original, fresh, tuned):
            quantize_(model, Int8WeightOnlyConfig())
        assert torch.equal(fresh(x), original(x))
        assert_close_enough(tuned(x), expected, 0.05)
    name = type(tuned.head.fc.weight).__name__
    assert name in {"Int8Tensor", "AffineQuantizedTensor"}  # the latter up to 0.17
    with pytest.raises(ArtifactError, match=rf"fc\d?.weight is a tensor of the class {name} .*: save first, quanti"):
        save(tuned, tmp_path / "model.pt")


@TORCHAO
def test_torchao_quantises_an_exported_program():
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x = torch.randn(X)

    def quantise(model):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        with torch.no_grad():
            prepared(x)
            converted = convert_pt2e(prepared)
        return converted, sum("quantize_per_tensor" in str(node.target) for node in converted.graph.nodes)

    _, expected = quantise(make_original().eval())
    if not expected and Version(torch.__version__) < Version("2.10"):
        pytest.skip("torchao quantises nothing of a program of torch 2.9, with or without blocks")
    assert expected
    model = make_tuned()
    converted, num_quantised = quantise(model)
    assert num_quantised >= expected
    with torch.no_grad():
        assert_close_enough(converted(x), model(x), 0.1)


@QUANTISED_TENSORS
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")  # torch's own observers
def test_torch_quantises_by_a_graph():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = make_tuned()
    x = torch.randn(X)
    with torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        assert_close_enough(convert_fx(prepared)(x), model(x), 0.05)


@QUANTISED_TENSORS
def test_torch_quantises_the_weights_of_the_classifier_while_it_runs():
    model = make_tuned()
    x = torch.randn(X)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert isinstance(quantised.fc, torch.ao.nn.quantized.dynamic.Linear)
    with torch.no_grad():
        assert_close_enough(quantised(x), model(x), 0.1)


@QUANTISED_TENSORS
def test_torch_quantises_the_layers_of_fused_blocks_while_they_run():
    model = optimize(make_tuned())
    x = torch.randn(X)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "FusedSqueezeExcite(\n        512, 16, relu" in repr(quantised)
    with torch.no_grad():
        assert_close_enough(quantised(x), model(x), 0.1)
