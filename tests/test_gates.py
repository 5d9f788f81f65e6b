"""What the gates of a network do: collected, fixed, folded."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from se_inject import (
    blocks,
    collect_gates,
    eject,
    freeze_backbone,
    inject,
    load,
    make_plan,
    optimize,
    param_groups,
    save,
    save_adapter,
    save_folder,
    standardize,
)
from se_inject.errors import DataError, ModelError
from se_inject.gate_folding import find_gate_folds
from se_inject.gate_statistics import GateTally
from se_inject.gates import Passed, fix_gates, get_own_blocks, is_fresh
from se_inject.plan import FOLDED
from se_inject.restriction import fold_gates
from se_inject.rewrite import find_plan, get_plan
from tests import nets
from tests.test_optimization import train_a_little


class Classifier(nn.Module):
    """Two residual blocks and three classes."""

    def __init__(self):
        super().__init__()
        self.stem, self.block1, self.block2 = nets.conv(3, 16), nets.Residual(16), nets.Residual(16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model():
    return train_a_little(inject(Classifier(), r=4, example=torch.zeros(2, 3, 8, 8)).eval())


def make_loader(num=10, labels=None, batch_size=4):
    images = torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(num) % 3 if labels is None else torch.tensor(labels)
    return DataLoader(TensorDataset(images, labels), batch_size)


def compute_gates(model, loader):
    """By each block's own `compute_gate`, from what it is handed."""
    found = {path: [] for path in blocks(model)}
    hooks = [
        block.register_forward_pre_hook(lambda block, args, path=path: found[path].append(block.compute_gate(*args)))
        for path, block in blocks(model).items()
    ]
    with torch.no_grad():
        for images, *_ in loader:
            model(images)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def test_the_gates_of_each_class_have_their_mean_and_deviation(model):
    before = copy.deepcopy(model.state_dict())
    loader = make_loader()
    found = collect_gates(model, loader, classes=["ape", "bee", "cat"], keep_images=True)
    assert list(found) == ["block1.se", "block2.se"]
    for path, gates in compute_gates(model, loader).items():
        data = found[path]
        assert data["mean"].dims == ("class", "channel")
        assert data["gate"].dims == ("image", "channel")
        assert data["count"].values.tolist() == [4, 3, 3]
        np.testing.assert_allclose(data["gate"].values, gates.numpy(), rtol=1e-6)
        for label, name in enumerate(["ape", "bee", "cat"]):
            own = gates[label::3].double()
            of_class = data.sel({"class": name})
            np.testing.assert_allclose(of_class["mean"].values, own.mean(0), rtol=1e-6)
            np.testing.assert_allclose(of_class["std"].values, own.std(0, correction=0), atol=1e-6)
        np.testing.assert_allclose(data["overall_mean"].values, gates.double().mean(0), rtol=1e-7)
        np.testing.assert_allclose(data["overall_std"].values, gates.double().std(0, correction=0), atol=1e-7)
        assert int(data["histogram"].sum()) == gates.numel()
        counts, _ = np.histogram(gates.numpy(), bins=40, range=(0, 2))
        assert data["histogram"].values.tolist() == counts.tolist()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(block.fc2._forward_hooks for block in blocks(model).values())


def test_images_without_labels_have_no_class(model):
    found = collect_gates(model, [images for images, _ in make_loader()])
    assert found["block1.se"]["count"].values.tolist() == [0, 0, 0]
    assert np.isnan(found["block1.se"]["mean"].values).all()
    assert not np.isnan(found["block1.se"]["overall_mean"].values).any()


@pytest.mark.parametrize("block", ["se", "eca", "cbam", "ge"])
def test_blocks_are_fresh_until_one_is_changed(block):
    model = inject(Classifier(), block=block, example=torch.zeros(2, 3, 8, 8))
    assert is_fresh(model)
    with torch.no_grad():
        for parameter in model.block2.se.parameters():
            parameter.add_(0.1)
    assert not is_fresh(model)


def test_the_mode_is_kept(model):
    model.train()
    collect_gates(model, make_loader())
    assert model.training


@pytest.mark.parametrize(("make", "match"), [
    (lambda: (Classifier(), make_loader()), "Classifier has not been injected"),
    (lambda: (inject(Classifier(), block="eca", example=torch.zeros(2, 3, 8, 8)), make_loader()),
     "no squeeze-and-excitation block whose gates could be seen; its blocks are"),
    (lambda: (optimize(inject(Classifier(), example=torch.zeros(2, 3, 8, 8))), make_loader()), "is optimized"),
])  # fmt: skip
def test_networks_without_gates_to_see_are_refused(make, match):
    with pytest.raises(ModelError, match=match):
        collect_gates(*make())


def test_what_is_wrong_with_the_images_is_said(model):
    with pytest.raises(DataError, match="the loader gave no images"):
        collect_gates(model, [])
    with pytest.raises(DataError, match="an image has the label 7, there are 3 classes"):
        collect_gates(model, make_loader(3, labels=[0, 1, 7]))
    images = torch.randn(2, 3, 8, 8)
    for batch, match in [
        ({"image": images}, "a batch is a dict; expected images"),
        ((images, torch.eye(3)[:2]), r"labels are float32 of shape \(2, 3\); expected a whole number an image, \(2,\)"),
        ((images, torch.zeros(2, 8, 8).long()), r"labels are int64 of shape \(2, 8, 8\)"),
        ((images, torch.zeros(2)), "labels are float32"),
    ]:
        with pytest.raises(DataError, match=match):
            collect_gates(model, [batch])


def test_an_image_with_a_negative_label_has_no_class(model):
    (data, *_) = collect_gates(model, make_loader(4, labels=[0, -100, 1, -1])).values()
    assert data["count"].values.tolist() == [1, 1, 0]
    (unlabelled, *_) = collect_gates(model, [make_loader(4).dataset.tensors[0]]).values()
    assert np.array_equal(data["overall_mean"], unlabelled["overall_mean"])


REFUSING = [
    blocks, collect_gates, eject, freeze_backbone, inject, make_plan, optimize, param_groups, save, save_adapter,
    save_folder, standardize,
]  # fmt: skip


@pytest.mark.parametrize("call", REFUSING)
def test_what_is_no_network_is_refused(call, tmp_path):
    rest = {
        collect_gates: ([],), save: (tmp_path / "a.pt",), save_adapter: (tmp_path / "a.safetensors",),
        save_folder: (tmp_path / "a",),
    }  # fmt: skip
    options = {"lr": 0.1, "se_lr": 0.1} if call is param_groups else {}
    with pytest.raises(ModelError, match=r"found a str; expected a torch.nn.Module"):
        call("resnet18", *rest.get(call, ()), **options)


def tally(gates, labels, num_classes=2, num_batches=2):
    block = inject(Classifier(), example=torch.zeros(2, 3, 8, 8)).block1.se
    tally = GateTally({"se": block}, num_classes)
    for part, own in zip(torch.tensor(gates).chunk(num_batches), torch.tensor(labels).chunk(num_batches), strict=True):
        tally.add({"se": Passed(torch.zeros(len(part), 1), part)}, own)
    return tally.summarise()["se"]


def test_the_measures_of_a_block_are_right():
    found = tally([[0.01, 1.0], [0.01, 1.0], [1.99, 1.0], [1.99, 1.0]], [0, 0, 1, 1])
    assert found.saturation == 0.5
    assert found.class_share == pytest.approx(1, abs=1e-6)
    assert found.variation == pytest.approx((0.99**2 / 2) ** 0.5)
    assert found.distance == pytest.approx((0.99**2 / 2) ** 0.5)
    assert not found.is_identity
    assert tally([[1.0], [1.0]], [0, 1]).is_identity


def test_noise_is_not_taken_for_what_the_class_tells():
    generator = torch.Generator().manual_seed(0)
    gates = 1 + 0.1 * torch.randn(60, 200, generator=generator)
    labels = torch.arange(60) % 20
    assert tally(gates.tolist(), labels.tolist(), num_classes=20).class_share < 0.02
    gates += 0.1 * torch.randn(20, 200, generator=generator)[labels]
    assert tally(gates.tolist(), labels.tolist(), num_classes=20).class_share == pytest.approx(0.5, abs=0.04)


def test_one_image_and_one_class_have_no_share():
    assert tally([[0.5]], [0], num_batches=1).class_share is None
    assert tally([[0.5], [0.7]], [0, 0]).class_share is None


def test_unreadable_images_do_not_count():
    found = tally([[0.5], [1.5], [0.7], [1.9]], [0, -2, -1, -2])
    assert found.counts.tolist() == [1, 0]
    assert found.mean.item() == pytest.approx(0.6)


def test_small_variations_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    gates = 1.3 + 1e-4 * torch.randn(1000, 3, generator=generator)
    found = tally(gates.tolist(), [0] * 1000, num_batches=10)
    assert torch.allclose(found.variance, gates.double().var(0, correction=0), rtol=1e-2)


def test_fixed_gates_are_the_same_for_every_image(model):
    gate = torch.linspace(0.5, 1.5, 16)
    seen = []
    inside = blocks(model)["block1.se"]

    def note(_, args, kwargs, out):
        seen.append((args[0], kwargs["shortcut"], out))

    with torch.no_grad(), fix_gates(model, {"block1.se": gate}):
        model.block1.se.register_forward_hook(note, with_kwargs=True)
        model(torch.randn(2, 3, 8, 8))
    assert model.block1.se is inside
    [(x, shortcut, out)] = seen
    assert torch.allclose(out, shortcut + x * gate[:, None, None])
    with pytest.raises(RuntimeError, match="stop"), fix_gates(model, {"block1.se": gate}):
        raise RuntimeError("stop")
    assert model.block1.se is inside


# Networks that write their branches and their last layers in different ways; with how many blocks fold.
FOLDING = {
    "resnet18": 8, "resnet50": 16, "mobilenetv2_100": 10, "convnext_atto": 12, "dla34": 12, "inception_v4": 22,
    "inception_resnet_v2": 43, "hrnet_w18_small": 26, "xception41": 12, "regnetx_002": 13, "res2net50_26w_4s": 16,
    "convnext_tiny": 18, "densenet121": 0, "dpn68": 0, "nf_resnet50": 0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDING)
def test_folding_computes_what_fixed_gates_do(name):
    model = train_a_little(inject(timm.create_model(name).eval())).double()
    own = get_own_blocks(model)
    folds = find_gate_folds(model)
    assert len(folds.folds) == FOLDING[name]
    assert set(folds.kept) == set(own) - {fold.block for fold in folds.folds}
    gates = {fold.block: 0.5 + torch.rand(own[fold.block].channels) for fold in folds.folds}
    size = 160 if name.startswith("inc") else 64
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        with fix_gates(model, gates):
            expected = model(x)
        folded = fold_gates(model, gates)
        assert set(blocks(folded)) == set(folds.kept)
        scale = expected.abs().max()
        assert (folded(x) - expected).abs().max() <= 1e-12 * scale  # of fp64: it is the same function
        assert scale > 0


@pytest.mark.parametrize("name", ["channels_last", "no_norm", "transposed", "grouped", "reader"])
def test_every_layer_takes_the_gate_at_its_channels(name):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1)
            self.b = {
                "channels_last": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
                "no_norm": nn.Conv2d(8, 8, 3, padding=1, groups=4),
                "transposed": nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2),
                "grouped": nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.LeakyReLU(0.2), nn.AvgPool2d(1)),
                "reader": nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()),
            }[name]
            self.c = nn.Conv2d(8, 8, 1, groups=2)

        def forward(self, x):
            out = self.b(self.a(x).permute(0, 2, 3, 1) if name == "channels_last" else self.a(x))
            if name == "channels_last":
                return out + x.permute(0, 2, 3, 1)
            return x + self.c(out)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.head = Branch(), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.branch(x).mean((1, 2) if name == "channels_last" else (2, 3)))

    placement = {"at": ["conv"], "include": ["branch.b*"]} if name in ("transposed", "reader") else {}
    if name == "reader":
        placement = {"placement": "standard", "at": ["residual"]}
    model = train_a_little(inject(Net().eval(), example=torch.zeros(2, 8, 6, 6), **placement)).double()
    own = get_own_blocks(model)
    folds = find_gate_folds(model)
    assert folds.folds, folds.kept
    gates = {fold.block: 0.5 + torch.rand(own[fold.block].channels) for fold in folds.folds}
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        with fix_gates(model, gates):
            expected = model(x)
        assert torch.allclose(fold_gates(model, gates)(x), expected, rtol=1e-12, atol=1e-14)


def test_folding_is_exact_to_a_millionth_in_single_precision():
    model = train_a_little(inject(timm.create_model("resnet50").eval()))
    gates = {path: 0.5 + torch.rand(block.channels) for path, block in get_own_blocks(model).items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        with fix_gates(model, gates):
            fixed = model(x)
        folded = fold_gates(model, gates)(x)
        exact = copy.deepcopy(model).double()
        with fix_gates(exact, gates):
            expected = exact(x.double())
    error = (folded - expected).abs().max() / expected.abs().max()
    assert error <= max(1e-6, 1.5 * float((fixed - expected).abs().max() / expected.abs().max()))


def test_a_folded_network_is_of_its_class_and_can_be_saved(model, tmp_path):
    gates = {"block1.se": torch.full((16,), 0.7)}
    folded = fold_gates(model, gates)
    assert type(folded) is Classifier
    assert type(folded.block1) is nets.Residual
    assert list(blocks(folded)) == ["block2.se"]
    assert [item.reason for item in get_plan(folded).passed_over][-1] == FOLDED
    x = torch.randn(2, 3, 8, 8)
    save(folded, tmp_path / "folded.pt")
    for again in (
        load(tmp_path / "folded.pt", base=Classifier),
        pickle.loads(pickle.dumps(folded)),
        copy.deepcopy(folded),
    ):
        assert torch.equal(again(x), folded(x))
    assert list(blocks(model)) == ["block1.se", "block2.se"]  # the given one is left as it is


def test_all_blocks_can_go_and_the_file_still_says_how(model, tmp_path):
    gates = {path: torch.full((16,), 0.7) for path in blocks(model)}
    folded = fold_gates(model, gates)
    assert not blocks(folded)
    save(folded, tmp_path / "folded.pt")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(tmp_path / "folded.pt", base=Classifier)(x), folded(x))


def test_what_is_left_when_all_blocks_are_gone_is_the_plain_network(model):
    folded = fold_gates(model, {path: torch.full((16,), 0.7) for path in blocks(model)})
    assert not is_fresh(folded)
    with pytest.raises(
        ModelError, match="Classifier has no block: all 2 were folded into its weights; se-inject eject"
    ):
        get_own_blocks(folded)
    plain = eject(folded)
    assert find_plan(plain) is None
    assert vars(plain).keys() == vars(Classifier()).keys()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), folded(x))
    assert len(blocks(inject(plain, example=x))) == 2


def test_eject_folds_the_gates_that_it_is_given(model):
    gates = {path: 0.5 + torch.rand(16) for path in blocks(model)}
    x = torch.randn(2, 3, 8, 8)
    plain = eject(model, gates=gates)
    assert list(plain.state_dict()) == list(Classifier().state_dict())
    with torch.no_grad(), fix_gates(model, gates):
        assert torch.allclose(plain(x), model(x), rtol=1e-5, atol=1e-6)
    unfolded = eject(model)
    assert torch.equal(unfolded.block1.bn2.weight, model.block1.bn2.weight)
    assert not torch.equal(plain.block1.bn2.weight, model.block1.bn2.weight)


def test_eject_takes_the_means_that_were_collected(model):
    means = {path: gates["overall_mean"] for path, gates in collect_gates(model, make_loader()).items()}
    tensors = {path: torch.tensor(mean.values) for path, mean in means.items()}
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(eject(model, gates=means)(x), eject(model, gates=tensors)(x))


def test_folding_refuses_what_it_cannot_do(model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"block3.se is no block of Classifier; its blocks are block1.se, block2.se"):
        fold_gates(model, {"block3.se": torch.ones(16)})
    with pytest.raises(ModelError, match=r"the gate of block1.se has the shape \(8,\); expected \(16,\)"):
        eject(model, gates={"block1.se": torch.ones(8)}, inplace=True)
    for gate in (torch.full((16,), -1.0), [float("nan")] * 16):
        with pytest.raises(ModelError, match="the gate of block2.se has numbers that are not finite or below 0"):
            eject(model, gates={"block1.se": torch.full((16,), 0.5), "block2.se": gate}, inplace=True)
    with pytest.raises(ModelError, match="the gate of block2.se is a str; expected numbers"):
        eject(model, gates={"block1.se": torch.full((16,), 0.5), "block2.se": "high"}, inplace=True)
    dense = inject(timm.create_model("densenet121").eval())
    path = next(iter(blocks(dense)))
    with pytest.raises(ModelError, match=f"the gate of {path} cannot be folded: .* is used by .* too; leave it out"):
        fold_gates(dense, {path: torch.ones(blocks(dense)[path].channels)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(blocks(model)) == ["block1.se", "block2.se"]


def test_a_border_block_says_why_it_stays():
    found = find_gate_folds(inject(torchvision.models.vgg11(), example=torch.zeros(2, 3, 64, 64)))
    assert not found.folds
    assert set(found.kept.values()) == {"`input` is what its owner is handed, not the output of a layer"}


def test_what_was_frozen_stays_frozen(model):
    model.block2.se.fc1.weight.requires_grad_(False)
    model.block2.eval()
    model.train()
    model.block2.se.eval()
    folded = fold_gates(model, {"block1.se": torch.ones(16)})
    assert not folded.block2.se.fc1.weight.requires_grad
    assert folded.block2.se.fc2.weight.requires_grad
    assert folded.training
    assert not folded.block2.se.training
