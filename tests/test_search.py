"""The search for the sites that are worth their blocks."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

from se_inject import blocks, inject, load, make_plan
from se_inject.budget import Budget, spend
from se_inject.contents import get_name
from se_inject.datasets import open_data
from se_inject.errors import DataError, ModelError, OptionError, TrainingError
from se_inject.jobs import InterruptedTrainingError
from se_inject.plan import Plan
from se_inject.recipe_files import read_recipe
from se_inject.rewrite import get_plan
from se_inject.search import _split, search
from se_inject.start import prepare_start
from se_inject.timing import time_blocks
from se_inject.world import stay_alone
from tests.digits import DigitNet, write_digits
from tests.test_cli import run  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:Cosine annealing scheduler:UserWarning")
NET = "tests.digits:DigitNet"
SETTINGS = "batch_size=16 crop=none hflip=0 workers=0".split()
WORLD = stay_alone("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 240)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a network that knows the digits a little, so that its gates have something to bring."""
    torch.manual_seed(0)
    model, digits = DigitNet().train(), load_digits()
    x = (torch.tensor(digits.images[:180, None], dtype=torch.float32) / 16 - 0.449) / 0.226
    y = torch.tensor(digits.target[:180])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "digits.pt"
    torch.save(model.state_dict(), path)
    return path


def make_start(weights, **options):
    model = DigitNet()
    model.load_state_dict(torch.load(weights))
    return prepare_start(model.eval(), None, 10, options={"r": 4, **options}, input_size=8)


def test_a_budget_is_read():
    assert Budget.parse("5%") == Budget(5, is_share=True, resource="parameters")
    assert Budget.parse(" 2.5 % ") == Budget(2.5)
    assert Budget.parse("20000") == Budget(20000, is_share=False)
    assert Budget.parse("0.5", "latency") == Budget(0.5, is_share=False, resource="latency")


@pytest.mark.parametrize(("text", "of", "match"), [
    ("much", "parameters", "--budget is 'much'; expected a share as in 5%, or a number of parameters"),
    ("0%", "parameters", "--budget is '0%'"),
    ("-3", "latency", "--budget is '-3'; expected a share as in 5%, or a number of ms"),
    ("nan", "latency", "--budget is 'nan'"),
    ("5%", "bytes", "--of is 'bytes'; expected parameters or latency"),
])  # fmt: skip
def test_a_wrong_budget_is_refused(text, of, match):
    with pytest.raises(OptionError, match=match):
        Budget.parse(text, of)


def test_a_budget_is_spent_on_what_is_worth_most_for_its_cost():
    values, costs = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.1}, {"a": 4.0, "b": 1.0, "c": 1.0, "d": 1.0}
    assert spend(values, costs, 3) == {"b", "c", "d"}
    assert spend(values, costs, 6) == {"a", "b", "c"}
    assert spend(values, costs, 0.5) == set()


@pytest.mark.slow
def test_the_best_sites_for_the_budget_are_found(weights, data):
    start = make_start(weights)
    before = {key: value.clone() for key, value in start.model.state_dict().items()}
    told = []
    recipe = read_recipe("short", SETTINGS)
    found = search(
        start, open_data(str(data), mode="L"), recipe, WORLD, Budget(1000, is_share=False), num_steps=40,
        report=lambda *args: told.append(args),
    )  # fmt: skip
    chosen = [candidate for candidate in found.candidates if candidate.is_chosen]
    assert chosen
    assert found.spent == found.plan.num_parameters <= 1000 == found.limit
    assert {site.path for site in found.plan.sites} == {candidate.path for candidate in chosen}
    assert {candidate.path for candidate in found.candidates} == set(blocks(start.model))
    assert all(candidate.gain > 0 for candidate in chosen)
    left = len(found.candidates) - len(chosen)
    reasons = [item.reason for item in found.plan.passed_over if item.reason.startswith("left out by the search")]
    assert len(reasons) == left
    assert told
    assert all(torch.equal(value, before[key]) for key, value in start.model.state_dict().items())
    model = DigitNet()
    model.load_state_dict(torch.load(weights))
    injected = inject(model.eval(), plan=found.plan)
    assert list(blocks(injected)) == [site.path for site in found.plan.sites]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(injected(x), model(x))
    assert Plan.from_json(found.plan.to_json()).to_json() == found.plan.to_json()


@pytest.mark.slow
def test_a_site_that_can_bring_nothing_is_left_out(weights, data):
    start = make_start(weights)
    with torch.no_grad():  # its branch is zero, whatever the gate
        start.model.block1.bn2.weight.zero_()
        start.model.block1.bn2.bias.zero_()
    recipe = read_recipe("short", SETTINGS)
    found = search(start, open_data(str(data), mode="L"), recipe, WORLD, Budget(100), num_steps=30)
    known = {candidate.path: candidate for candidate in found.candidates}
    assert known["block1.se"].gradient == 0
    assert not known["block1.se"].is_chosen


def test_time_can_be_spent_too(weights):
    start = make_start(weights)
    own = blocks(start.model)
    times = time_blocks(start.model, own, torch.zeros(4, 1, 8, 8), rounds=3)
    assert set(times) == set(own)
    assert all(time > 0 for time in times.values())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in own.values())


def test_the_sum_that_a_block_computes_is_not_its_own(monkeypatch):
    class Adding(nn.Module):
        def forward(self, x, shortcut=None):
            return x if shortcut is None else x + shortcut

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.summing, self.idle = Adding(), Adding()

        def forward(self, x):
            return self.idle(self.summing(x, shortcut=x))

    net, ticks = Net(), itertools.count()
    monkeypatch.setattr("se_inject.timing._read_clock", lambda _: float(next(ticks)))
    times = time_blocks(net, {"summing": net.summing, "idle": net.idle}, torch.zeros(1, 2, 4, 4), rounds=2)
    assert times == {"summing": 1e-4, "idle": 1000.0}  # one tick for the block, less one for the sum


def search_quickly(start, data):
    recipe = read_recipe("short", SETTINGS)
    return search(start, open_data(str(data), mode="L"), recipe, WORLD, Budget(100), num_steps=1)


def test_a_network_with_branches_of_zeros_is_refused(weights, data):
    start = make_start(weights)
    with torch.no_grad():
        for owner in (start.model.block1, start.model.down, start.model.block2):
            owner.bn2.weight.zero_()
            owner.bn2.bias.zero_()
    with pytest.raises(ModelError, match=r"no gate changes what DigitNet gives: .* search in the trained one"):
        search_quickly(start, data)


def test_gradients_that_say_nothing_choose_nothing(weights, data, monkeypatch):
    own = blocks(make_start(weights).model)
    monkeypatch.setattr("se_inject.search.measure_gradients", lambda *_: dict.fromkeys(own, -1.0))
    monkeypatch.setattr("se_inject.search.measure_gains", lambda *_: dict.fromkeys(own, -0.1))
    with pytest.raises(DataError, match=r"lowered the loss .* nor do their gradients say anything; more --steps"):
        search_quickly(make_start(weights), data)


def test_a_search_that_is_stopped_gives_no_advice_that_fails(weights, data, monkeypatch):
    def stop(*_):
        raise InterruptedTrainingError("stopped after step 1; the same command with --resume goes on")

    monkeypatch.setattr("se_inject.search.train", stop)
    with pytest.raises(TrainingError, match="^the search was stopped, and wrote nothing$"):
        search_quickly(make_start(weights), data)


def test_attention_of_another_kind_is_refused_before_any_work(weights, data, monkeypatch):
    monkeypatch.setattr("se_inject.search.copy_model", None)
    with pytest.raises(ModelError, match="no squeeze-and-excitation block"):
        search_quickly(make_start(weights, block="eca", r=16), data)


def test_what_cannot_be_searched_is_refused(weights, data):
    images, recipe = open_data(str(data), mode="L"), read_recipe("short", SETTINGS)
    start = make_start(weights)
    with pytest.raises(OptionError, match="--steps is 0; it must be at least 1"):
        search(start, images, recipe, WORLD, Budget(5), num_steps=0)
    with pytest.raises(OptionError, match=r"--budget is 3 parameters, and the cheapest block, block1.se, takes 280"):
        search(start, images, recipe, WORLD, Budget(3, is_share=False))
    few = replace(images, train=torch.utils.data.Subset(images.train, [0]))
    with pytest.raises(DataError, match="has 1 training images; a search needs some to learn from and some to judge"):
        search(start, few, recipe, WORLD, Budget(5))
    with torch.no_grad():
        start.model.block1.se.fc2.weight.add_(1)
    with pytest.raises(ModelError, match="the blocks of DigitNet were trained already"):
        search(start, images, recipe, WORLD, Budget(5))


@pytest.mark.slow
def test_the_command_writes_a_plan_that_the_others_take(run, weights, data):  # noqa: F811
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    common = ("--weights", weights, "--data", data, "--input-size", 8)
    code, out, err = run("search", NET, *common, "--r", 4, *settings, "--budget", 1000, "--steps", 40)
    assert code == 0, err
    plan = Plan.from_json(Path("plan.json").read_text())
    assert f"plan.json: a plan of {len(plan.sites)} of 3 blocks, {plan.num_parameters:,} of 1,000 parameters" in out
    code, out, _ = run("search", NET, *common, "--r", 4, *settings, "--budget", 1000, "--steps", 40, "--json")
    values = json.loads(out)
    assert values["spent"] == plan.num_parameters
    assert {site["path"] for site in values["sites"] if site["is_chosen"]} == {site.path for site in plan.sites}
    code, out, err = run("inject", NET, "--weights", weights, "--plan", "plan.json", "--out", "model.pt")
    assert code == 0, err
    assert list(blocks(load("model.pt", trust_source=True))) == [site.path for site in plan.sites]
    code, out, err = run(
        "finetune", NET, *common, "--plan", "plan.json", *settings, "--epochs", "0.2", "--out", "tuned.pt"
    )
    assert code == 0, err
    assert get_plan(load("tuned.pt", trust_source=True)).sites == plan.sites
    code, out, _ = run("plan", NET, "--weights", weights, "--plan", "plan.json", "--graph", "plan.svg")
    assert code == 0
    assert "left out by the search" in out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["learning", "judging"])
def test_the_command_skips_what_cannot_be_read(run, weights, tmp_path, part):  # noqa: F811
    folder = write_digits(tmp_path / "digits", 240)
    images = open_data(str(folder), mode="L")
    learning, judging = _split(images)
    bad = Path(get_name({"learning": learning, "judging": judging}[part], 0))
    bad.write_bytes(bad.read_bytes()[:40])
    settings = [word for setting in SETTINGS[:-1] for word in ("--set", setting)]
    args = ("search", NET, "--weights", weights, "--data", folder, "--input-size", 8, "--r", 4, *settings)
    args = (*args, "--budget", 1000, "--steps", 12, "--workers", 0)
    code, _, err = run(*args)
    assert code == 1
    assert f"1 image cannot be read, at most 0 are skipped: {bad}" in err
    code, _, err = run(*args, "--max-bad", 1)
    assert code == 0, err


@pytest.mark.slow
def test_the_command_spends_time_too(run, weights, data):  # noqa: F811
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    args = ("--weights", weights, "--data", data, "--input-size", 8, "--r", 4, *settings, "--steps", 5)
    code, out, err = run("search", NET, *args, "--budget", "1000%", "--of", "latency", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["resource"] == "latency"
    assert values["limit"] == pytest.approx(10 * values["base"])
    assert 0 < values["spent"] <= values["limit"]
    assert all(site["cost"] > 0 for site in values["sites"])
    code, out, err = run("search", NET, *args, "--budget", "1e-9", "--of", "latency")
    assert code == 1
    assert "--budget is 1e-09 ms, and the cheapest block, " in err


@pytest.mark.parametrize(("args", "message"), [
    (("inject", NET, "--no-pretrained", "--plan", "none.json"), "none.json cannot be read as a plan: No such file"),
    (("inject", NET, "--no-pretrained", "--plan", "bad.json"), "not a plan of se-inject"),
    (("plan", NET, "--plan", "bad.json", "--r", "4"), "--plan holds all options already; leave out --r, or --plan"),
    (("plan", NET, "--plan", "bad.json", "--skip-last-stage"), "leave out --skip-last-stage, or --plan"),
    (("search", NET, "--no-pretrained", "--data", ".", "--budget", "5%", "--out", "x.pt"), "x.pt"),
    (("search", NET, "--no-pretrained", "--data", "nothing", "--budget", "5%"), "there is no folder nothing"),
])  # fmt: skip
def test_bad_input_gets_one_line(run, args, message):  # noqa: F811
    Path("bad.json").write_text("{}")
    code, out, err = run(*args)
    assert code == 1
    assert message in err
    assert out == ""


@pytest.mark.parametrize("command", ["plan", "inject"])
def test_a_plan_for_images_of_other_channels_gets_one_line(run, command):  # noqa: F811
    Path("rgb.json").write_text(make_plan(timm.create_model("resnet10t"), example=torch.zeros(1, 3, 32, 32)).to_json())
    code, out, err = run(command, "resnet10t", "--no-pretrained", "--in-chans", "1", "--plan", "rgb.json")
    assert code == 1
    assert (
        "ResNet does not run on an input of shape (2, 3, 32, 32), with which the plan was made: Given groups=1" in err
    )
    assert out == ""
    assert not Path("resnet10t.pt").exists()
