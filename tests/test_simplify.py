"""Simplification and reduction: blocks that do what weights can do are folded, others made smaller."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from se_inject import SqueezeExcite, blocks, inject, load, save
from se_inject.datasets import open_data
from se_inject.errors import ModelError, OptionError
from se_inject.formats import InputFormat
from se_inject.loaders import EvalLoader
from se_inject.provenance import Source
from se_inject.reduction import Moments, rank_units, reduce_block
from se_inject.rewrite import get_plan
from se_inject.simplify import simplify
from se_inject.validation import CACHE, Validation
from se_inject.world import stay_alone
from tests import nets
from tests.images_on_disk import make_folder
from tests.test_cli import run  # noqa: F401

NET = "tests.test_simplify:Brightness"
HIDDEN = 8


class Brightness(nn.Module):
    """Tells bright images from dark ones by two residual blocks whose branches are the map itself."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.block1, self.block2, self.block3 = nets.Residual(16), nets.Residual(16), nets.Residual(16)
        self.fc = nn.Linear(16, num_classes)
        self.has_last = True

    def forward(self, x):
        x = self.block2(self.block1(self.stem(x)))
        return self.fc((self.block3(x) if self.has_last else x).mean((2, 3)))


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "images", num=20, size=(8, 8))


@pytest.fixture
def model():
    """block1's gates are the same for all images; block2's decide the class; block3's hardly depend on the image."""
    torch.manual_seed(0)
    model = inject(Brightness(), r=2, example=torch.zeros(2, 3, 8, 8)).eval()
    with torch.no_grad():
        for path, block in blocks(model).items():
            for layer in (block.fc1, block.fc2):
                layer.weight.normal_(0, 0.3)
                layer.bias.normal_(0, 0.3)
            if path == "block1.se":
                block.fc2.weight.zero_()
            if path == "block3.se":
                block.fc2.weight.mul_(1e-3)
    return model


def make_validation(data, cache=CACHE):
    opened = open_data(str(data), is_evaluation=True)
    loader = EvalLoader(
        opened.val, InputFormat((3, 8, 8)), batch_size=16, workers=0, world=stay_alone("cpu"), cache=cache
    )
    return Validation(opened, loader, stay_alone("cpu"), 2)


def fit(model, data):
    """Fit the classifier so that the class is read off what block2's gate makes of the image."""
    features, labels = [], []
    hook = model.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        for images, targets in make_validation(data).loader:
            model(images)
            labels.append(targets)
    hook.remove()
    x, y = torch.cat(features), torch.cat(labels).float() * 2 - 1
    mean, std = x.mean(0), x.std(0) + 1e-6
    weights = torch.linalg.lstsq(torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1), y[:, None]).solution[:, 0]
    with torch.no_grad():
        model.fc.weight[1] = weights[:-1] / std
        model.fc.weight[0] = -model.fc.weight[1]
        model.fc.bias[1] = weights[-1] - (weights[:-1] / std * mean).sum()
        model.fc.bias[0] = -model.fc.bias[1]


def test_batches_are_kept_where_they_fit(data):
    validation = make_validation(data)
    first, second = list(validation.loader), list(validation.loader)
    assert all(a is b and torch.equal(x, y) for (x, a), (y, b) in zip(first, second, strict=True))
    validation = make_validation(data, cache=100)
    first, second = list(validation.loader), list(validation.loader)
    assert all(a is not b and torch.equal(x, y) for (x, a), (y, b) in zip(first, second, strict=True))


def test_blocks_whose_gates_do_not_matter_go_first(model, data):
    fit(model, data)
    told = []
    found = simplify(model, make_validation(data), max_drop=0, rounds=1, report=lambda *args: told.append(args))
    assert found.before.top1 == 100
    assert found.after.top1 == 100
    folded = [step.path for step in found.steps if step.action == "fold"]
    assert {"block1.se", "block3.se"} <= set(folded)
    assert folded.index("block1.se") < 2
    assert set(blocks(found.model)) == set(found.kept) == set(blocks(model)) - set(folded)
    counts = [sum(p.numel() for p in model.parameters()), *(step.parameters for step in found.steps)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == sum(p.numel() for p in found.model.parameters())
    assert all(step.speed > 0 for step in found.steps)
    done = [args[1] for args in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2]
    assert len(blocks(model)) == 3  # the given one is left as it is


def test_blocks_that_do_not_run_stay(model, data):
    fit(model, data)
    model.has_last = False
    found = simplify(model, make_validation(data), max_drop=100, rounds=1)
    assert found.kept == {"block3.se": "it does not run on these images"}
    assert list(blocks(found.model)) == ["block3.se"]


def test_what_the_steps_say_is_what_the_network_does(model, data):
    fit(model, data)
    validation = make_validation(data)
    found = simplify(model, validation, max_drop=100, rounds=1)
    assert found.num_folded == 3
    assert not blocks(found.model)
    assert found.after.top1 == pytest.approx(found.steps[-1].top1)
    assert found.after.loss == pytest.approx(found.steps[-1].loss, rel=1e-4)


def make_deciding():
    """A network whose answer comes from block2's gate: it is 1.9 for dark images, whose map is 0.7, and 0.1 for bright
    ones, whose map is 1.3, so that the sum is larger for the dark ones. With one gate for all it is the other way."""
    model = inject(Brightness(), r=2, example=torch.zeros(2, 3, 8, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.stem.weight[0] = 0.3 / 1.7 / 3
        model.stem.bias[0] = 1
        model.block2.conv1.weight[0, 0, 1, 1] = model.block2.conv2.weight[0, 0, 1, 1] = 1
        model.block2.bn1.weight[0] = model.block2.bn2.weight[0] = 1
        se = blocks(model)["block2.se"]
        se.fc1.weight[0, 0], se.fc1.bias[0] = 1, -1
        se.fc2.weight[0, 0], se.fc2.bias[0] = -20, 3
        blocks(model)["block1.se"].fc2.bias[3] = 1  # a gate that is not 1, of a channel that is zero
        model.fc.weight[1, 0], model.fc.bias[1] = -1, 1.72
    return model


def test_a_block_that_decides_stays(data):
    model = make_deciding()
    found = simplify(model, make_validation(data), max_drop=50, rounds=1)
    assert found.before.top1 == 100
    assert [step.path for step in found.steps if step.action == "fold"] == ["block1.se", "block3.se"]
    assert found.kept == {"block2.se": "with its mean gate top-1 would be 0.00 %"}
    assert [(step.path, step.hidden) for step in found.steps if step.action == "reduce"] == [("block2.se", 1)]
    assert found.after.top1 == 100
    assert list(blocks(found.model)) == ["block2.se"]
    assert blocks(found.model)["block2.se"].fc1.out_channels == 1


@torch.no_grad()
def test_units_that_tell_nothing_are_left_out():
    torch.manual_seed(0)
    block = SqueezeExcite(32, 4)
    with torch.no_grad():
        block.fc1.weight.normal_()
        block.fc1.weight[4:] = 2 * block.fc1.weight[:4]  # half of the units say the same as the others
        block.fc1.bias.zero_()
        block.fc2.weight.normal_()
        block.fc2.bias.normal_()
    z = torch.randn(500, 32)
    moments = Moments.start(block)
    for part in z.split(100):
        moments.add(torch.relu(part @ block.fc1.weight.flatten(1).T + block.fc1.bias))
    ranking = rank_units(block, moments)
    assert ranking.count_needed(0.9999999) == 4
    assert all(told <= possible + 1e-9 for told, possible in zip(ranking.told, ranking.possible, strict=True))
    smaller = reduce_block(block, moments, ranking.order[:4])
    maps = z[:, :, None, None]
    assert smaller.fc1.out_channels == 4
    assert torch.allclose(smaller.compute_gate(maps), block.compute_gate(maps), atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in block.parameters())
    assert block.fc1.out_channels == 8


@torch.no_grad()
def test_units_that_are_left_out_are_made_up_for():
    torch.manual_seed(0)
    block = SqueezeExcite(32, 4)
    with torch.no_grad():
        block.fc1.bias.normal_()
        block.fc2.weight.normal_(0, 0.3)
    z = torch.randn(500, 32)
    moments = Moments.start(block)
    hidden = torch.relu(z @ block.fc1.weight.flatten(1).T + block.fc1.bias)
    moments.add(hidden)
    ranking = rank_units(block, moments)
    outputs = hidden @ block.fc2.weight.flatten(1).T
    whole = outputs.var(0, correction=0).sum()
    for k in (2, 4, 6):
        smaller = reduce_block(block, moments, ranking.order[:k])
        own = torch.relu(z @ smaller.fc1.weight.flatten(1).T + smaller.fc1.bias)
        found = own @ smaller.fc2.weight.flatten(1).T + smaller.fc2.bias
        left = (found - outputs - block.fc2.bias).pow(2).mean(0).sum()
        assert 1 - left / whole == pytest.approx(ranking.told[k - 1], abs=1e-4)


@torch.no_grad()
def test_without_biases_the_mean_is_not_made_up_for():
    torch.manual_seed(0)
    block = SqueezeExcite(32, 4, bias=False)
    with torch.no_grad():
        block.fc2.weight.normal_()
        block.fc1.weight[4:] = 2 * block.fc1.weight[:4]
    z = torch.rand(300, 32)
    moments = Moments.start(block)
    moments.add(torch.relu(z @ block.fc1.weight.flatten(1).T))
    ranking = rank_units(block, moments)
    smaller = reduce_block(block, moments, ranking.order[: ranking.count_needed(0.9999999)])
    maps = z[:, :, None, None]
    assert smaller.fc1.out_channels <= 4
    assert torch.allclose(smaller.compute_gate(maps), block.compute_gate(maps), atol=1e-4)


def test_a_smaller_block_is_written_and_read(data, tmp_path):
    found = simplify(make_deciding(), make_validation(data), max_drop=0, rounds=1)
    save(found.model, tmp_path / "smaller.pt")
    again = load(tmp_path / "smaller.pt", base=Brightness)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), found.model(x))
    assert {site.path: site.hidden for site in get_plan(again).sites} == {"block2.se": 1}


def test_a_network_that_was_never_trained_is_refused(data):
    fresh = inject(Brightness(), example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ModelError, match="every gate of Brightness is 1 for every image: its 3 blocks were never"):
        simplify(fresh, make_validation(data))
    with pytest.raises(ModelError, match="has not been injected"):
        simplify(Brightness(), make_validation(data))
    with pytest.raises(OptionError, match="max_drop is -1; expected points of per cent, at least 0"):
        simplify(fresh, make_validation(data), max_drop=-1)


def test_an_image_a_class_is_enough_to_run(tmp_path):
    found = simplify(make_deciding(), make_validation(make_folder(tmp_path / "few", num=1, size=(8, 8))), rounds=1)
    assert found.before.num_images == 2
    assert found.after.top1 == 100


@pytest.fixture
def artifact(model, data, tmp_path):
    fit(model, data)
    save(model, tmp_path / "tuned.pt", source=Source("factory", NET))
    return tmp_path / "tuned.pt"


COMMON = ["--trust-source", "--workers", "0", "--input-size", "8"]


def test_the_command_writes_and_says_what_it_did(run, artifact, data):  # noqa: F811
    args = (
        "simplify",
        artifact,
        *COMMON,
        "--data",
        data,
        "--max-drop",
        "100",
        "--out",
        "smaller.pt",
        "--plot",
        "steps.svg",
    )
    code, out, err = run(*args)
    assert code == 0, err
    assert "smaller.pt: 3 of 3 blocks folded, top-1 100.00 -> " in out
    assert "block2.se" in out
    assert not blocks(load("smaller.pt", trust_source=True))
    assert Path("steps.svg").read_text().startswith("<?xml")
    code, out, _ = run(*args, "--json")
    values = json.loads(out)
    assert values["num_folded"] == 3
    assert [step["action"] for step in values["steps"]] == ["fold"] * 3
    assert set(values["steps"][0]) == {"path", "action", "hidden", "top1", "loss", "parameters", "speed"}
    code, out, _ = run("evaluate", "smaller.pt", *COMMON, "--data", data, "--json")
    assert json.loads(out)["top1"] == values["after"]["top1"]


def test_the_original_comes_back_with_and_without_its_gates(run, artifact, data):  # noqa: F811
    code, out, _ = run("eject", artifact, "--trust-source", "--out", "plain.pt")
    assert code == 0
    assert out == (
        "plain.pt: the state dict of Brightness, with its present weights, without gates; give it as --weights "
        "plain.pt\n"
    )
    code, out, _ = run(
        "eject", artifact, "--trust-source", "--out", "folded.pt", "--fold", "--data", data, "--input-size", 8
    )
    assert code == 0
    assert out.startswith("folded.pt: the state dict of Brightness, with the mean gates of 3 blocks")
    plain, folded = (torch.load(name)["state_dict"] for name in ("plain.pt", "folded.pt"))
    assert list(plain) == list(folded) == list(Brightness().state_dict())
    assert not torch.equal(plain["block1.bn2.weight"], folded["block1.bn2.weight"])
    code, out, _ = run("evaluate", NET, "--weights", "folded.pt", *COMMON[1:], "--data", data, "--json")
    assert json.loads(out)["top1"] > 90


def test_gates_are_folded_over_the_images_that_the_options_say(run, artifact, data):  # noqa: F811
    args = ("eject", artifact, "--trust-source", "--fold", "--data", "both", "--input-size", 8, "--workers", 0)
    Path("both").mkdir()
    data.rename("both/test")
    make_folder("both/val", num=3, size=(8, 8), seed=1)
    bad = Path("both/test/cat/0.png")
    bad.write_bytes(bad.read_bytes()[:40])
    code, _, err = run(*args, "--val-split", "test")
    assert code == 1
    assert "1 image cannot be read, at most 0 are skipped" in err
    assert "or allow more with --max-bad 1" in err
    options = ("--val-split", "test", "--batch-size", 8)
    code, _, err = run(*args, *options, "--max-bad", 1, "--out", "skipped.pt")
    assert (code, "1 image could not be read, not counted: " in err, "cat/0.png" in err) == (0, True, True)
    bad.unlink()
    assert run(*args, *options, "--out", "removed.pt")[0] == 0
    assert run(*args, "--out", "val.pt")[0] == 0
    skipped, removed, val = (torch.load(f"{name}.pt")["state_dict"] for name in ("skipped", "removed", "val"))
    for name, value in skipped.items():
        torch.testing.assert_close(value, removed[name])  # sums over batches of other sizes round differently
    assert not torch.allclose(skipped["block2.bn2.weight"], val["block2.bn2.weight"])


def test_a_network_whose_blocks_are_all_folded_says_so_and_how_to_go_on(run, artifact, data):  # noqa: F811
    options = (*COMMON, "--data", data)
    assert run("simplify", artifact, *options, "--max-drop", 100)[0] == 0
    code, out, _ = run("eject", "smaller.pt", "--trust-source")
    assert code == 0
    assert out == (
        "plain.pt: the state dict of Brightness, with its present weights, without gates but those of 3 blocks, which "
        "they carry; give it as --weights plain.pt\n"
    )
    plain, folded = torch.load("plain.pt")["state_dict"], load("smaller.pt", trust_source=True).state_dict()
    assert list(plain) == list(Brightness().state_dict())
    assert all(torch.equal(value, folded[key]) for key, value in plain.items())
    advice = "Brightness has no block: all 3 were folded into its weights; se-inject eject, without --fold, writes its"
    tuning = ("finetune", "smaller.pt", "--trust-source", "--data", data, "--input-size", 8)
    for words in (
        ("simplify", "smaller.pt", *options),
        ("report", "smaller.pt", *options),
        ("eject", "smaller.pt", "--trust-source", "--fold", "--data", data, "--input-size", 8),
        tuning,
        (*tuning, "--compare"),
        ("export", "smaller.pt", "--trust-source", "--to", "adapter"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (1, "")
        assert advice in err
    assert not Path("runs").exists()
    assert run("export", "smaller.pt", "--trust-source", "--to", "folder", "--out", "folder")[0] == 0
    card = Path("folder/README.md").read_text()
    assert "All 3 blocks of channel attention, put in by se-inject" in card
    assert "All 3 were folded into the weights.\n\nWithout a block:\n\n- 3 residual: its gate is folded into" in card
    assert "How it was trained is not recorded here." in card
    for wrong in ("have not been trained", "0 blocks", "identity, so", "| block |"):
        assert wrong not in card


@pytest.mark.parametrize(("args", "message"), [
    (("simplify", "tuned.pt", *COMMON, "--data", "nothing"), "there is no folder nothing"),
    (("simplify", "tuned.pt", *COMMON, "--data", "images", "--out", "no/x.pt"), "there is no folder no"),
    (("simplify", "tuned.pt", *COMMON, "--data", "images", "--max-drop", "-1"), "max_drop is -1"),
    (("simplify", "none.pt", *COMMON, "--data", "nothing", "--max-drop", "-1"), "max_drop is -1"),
    (("simplify", "none.pt", *COMMON, "--data", "nothing", "--max-drop", "nan"), "max_drop is nan"),
    (("simplify", "tuned.pt", *COMMON, "--data", "images/cat"), "images/cat"),
    (("simplify", NET, "--no-pretrained", *COMMON[1:], "--data", "images"), "Brightness has not been injected"),
    (("eject", "tuned.pt", "--trust-source", "--fold"), "--fold without --data; the mean gates"),
    (("eject", "tuned.pt", "--trust-source", "--data", "images"), "--data without --fold"),
    (("eject", "tuned.pt", "--trust-source", "--max-bad", "3"), "--max-bad without --fold; the mean gates"),
    (("eject", NET, "--no-pretrained"), "Brightness has not been injected; there is nothing to eject"),
])  # fmt: skip
def test_bad_input_gets_one_line(run, artifact, data, args, message):  # noqa: F811
    code, out, err = run(*args)
    assert code == 1
    assert out == ""
    assert message in err
    assert not Path("smaller.pt").exists()
