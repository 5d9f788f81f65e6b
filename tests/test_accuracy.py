"""The benchmark of accuracy: its arms, its summary, and a run from end to end on images made here."""

import json
import sys

import pytest
import torch

from benchmarks import accuracy, accuracy_runs
from benchmarks.accuracy_networks import ARMS, CifarResNet, make_data, make_model
from benchmarks.accuracy_report import summarise, write_table
from se_inject import SqueezeExcite, blocks
from se_inject.errors import DataError, SourceError
from tests.images_on_disk import make_folder


def make_row(arm, seed, top1, **other):
    values = {"network": "resnet20", "share": 0.1, "epochs": 1.0, "steps": 78, "val_loss": 0.5, "seconds": 10.0}
    counts = {"parameters": 270_000, "images_per_second": 300.0, "before": 81.0, "top1_unchosen": top1 - 1}
    return {**values, **counts, "arm": arm, "seed": seed, "top1": top1, **other}


def test_differences_are_paired_by_seed_with_students_interval():
    points = {"se": [86.0, 87.0, 85.5], "control": [85.5, 86.0, 85.5]}
    rows = [make_row(arm, seed, top1) for arm, all_ in points.items() for seed, top1 in enumerate(all_)]
    (budget,) = summarise(rows)
    found = budget["differences"]["control"]
    assert found["points"] == pytest.approx(0.5)
    half = 4.302653 * 0.5 / 3**0.5  # Student's t for two degrees of freedom, the deviation of 0.5, 1 and 0
    assert (found["low"], found["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert budget["arms"]["se"]["top1"] == pytest.approx(86.1667, abs=1e-4)


def test_a_seed_that_one_arm_lacks_is_in_no_difference():
    rows = [make_row("se", 0, 86.0), make_row("se", 1, 10.0), make_row("control", 0, 85.0)]
    (budget,) = summarise(rows)
    assert budget["differences"]["control"] | {"val_loss": 0} == {
        "points": 1.0, "low": None, "high": None, "val_loss": 0, "num_seeds": 1,
    }  # fmt: skip


def test_the_arms_differ_in_what_they_say_they_do():
    own = ["se_lr=0.3", "gates_share=0.1", "distill=0.5"]
    found = {arm: accuracy.make_recipe_of(arm, "short", ["lr=0.02"], own) for arm in ARMS}
    assert {recipe.lr for recipe in found.values()} == {0.02}
    assert (found["se"].se_lr, found["se"].distill) == (0.3, 0.5)
    assert (found["control"].distill, found["control_distill"].distill) == (0, 0.5)
    for arm in ("default", "every_conv"):
        assert (found[arm].gates_share, found[arm].distill) == (0, 0)
        assert accuracy_runs.settle_rates(arm, found[arm]).se_lr == 0.02
    assert accuracy_runs.settle_rates("se", found["se"]).se_lr == 0.3


def test_the_networks_of_the_arms_begin_as_they_say():
    torch.manual_seed(0)
    plain = CifarResNet(3).eval()
    images = torch.randn(2, 3, 32, 32)
    models = {arm: make_model(plain, arm, r=16, size=(3, 32, 32)).eval() for arm in ARMS[:4]}
    assert {arm: len(blocks(model)) for arm, model in models.items()} == {
        "control": 0, "se": 9, "default": 9, "every_conv": 19,
    }  # fmt: skip
    assert torch.equal(models["se"](images), plain(images))
    for arm in ("default", "every_conv"):
        block = next(iter(blocks(models[arm]).values()))
        assert isinstance(block, SqueezeExcite)
        assert block.gain == 1
        assert not torch.equal(models[arm](images), plain(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes that differ in brightness, and weights that know nothing."""
    root = tmp_path_factory.mktemp("cifar")
    for part, num in (("train", 8), ("test", 4)):
        make_folder(root / part, [str(label) for label in range(10)], num, (32, 32), seed=part)
    torch.manual_seed(0)
    state = {f"module.{key}": value for key, value in CifarResNet(3).state_dict().items()}
    torch.save({"state_dict": state}, root / "weights.th")
    return root


def test_a_share_of_the_images_has_the_same_part_of_every_class(folder):
    data = make_data("resnet20", folder, share=0.25, seed=3)
    labels = [label for _, label in (data.train[i] for i in range(len(data.train)))]
    assert [labels.count(label) for label in range(10)] == [2] * 10
    assert data.train.indices != make_data("resnet20", folder, share=0.25, seed=4).train.indices


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Cosine annealing scheduler:UserWarning")
def test_a_command_runs_goes_on_and_writes_its_table(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    given = ["--data", folder, "--weights", folder / "weights.th", "--share", 1, "--epochs", 1, "--out", out]
    given += ["--arms", "se", "control", "--set-all", "batch_size=16", "--set-all", "crop=padded"]

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, [*given, *more])])
        accuracy.main()
        return json.loads(out.read_text())

    first = call("--seeds", 1)
    assert [(row["arm"], row["seed"], row["steps"], row["num_val"]) for row in first["rows"]] == [
        ("se", 0, 5, 40), ("control", 0, 5, 40),
    ]  # fmt: skip
    se, control = first["rows"]
    assert se["before"] == control["before"]
    assert se["parameters"] > control["parameters"]
    capsys.readouterr()
    both = call("--seeds", 2)
    err = capsys.readouterr().err
    assert "seed 1, se" in err
    assert "seed 0" not in err  # it was in the log
    assert [{**row, "commit": ""} for row in both["rows"][:2]] == [{**row, "commit": ""} for row in first["rows"]]
    assert "score the same in 2 of 2 pairs" in write_table(both)
    choosing = call("--seeds", 1, "--choosing")
    assert [(row["num_val"], row["top1_unchosen"]) for row in choosing["rows"]] == [(20, None)] * 2
    assert choosing["summary"][0]["differences_unchosen"]["control"]["points"] is None
    # A start that is broken by pasted-in blocks is trained with the original's temperature.
    pasted = call("--seeds", 1, "--arms", "default", "control")["rows"]
    assert pasted[0]["label_temperature"] == pasted[1]["label_temperature"]


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="holds no folders of images"):
        make_data("resnet20", tmp_path, share=1, seed=0)
    with pytest.raises(DataError, match="the Debian package dataset-fashion-mnist has it"):
        make_data("efficientnet_lite0", folder, share=1, seed=0)
    with pytest.raises(SourceError, match="resnet56 is not|is not resnet56's"):
        accuracy.open_pretrained("resnet56", weights=folder / "weights.th", input_size=32, seed=0)
