"""What is counted and timed side by side."""

import functools
import json

import pytest
import torch
from torch import nn

from se_inject import inject, optimize
from se_inject.console import print_speed
from se_inject.errors import ExampleError, ModelError, OptionError
from se_inject.speed import compare_speed, measure_network
from se_inject.speed_chart import draw_speed
from se_inject.timing import Conditions, get_base
from tests import nets

QUICK = Conditions(batch_size=2, rounds=3, compiled=False, training=True)


class Peer(nn.Module):
    """A network that does more than the plain one."""

    def __init__(self):
        super().__init__()
        self.body = nets.wrap(nets.Residual(16))

    def forward(self, x):
        return self.body(x * 1.5)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    return measure_network(nets.wrap(nets.Residual(16)), QUICK, peers={"peer": Peer()}, options={"r": 4})


def test_each_network_is_measured_and_optimized(measured):
    names = [row.name for row in measured.rows]
    assert names == ["plain", "plain, optimized", "injected", "optimized", "peer", "peer, optimized"]
    assert [get_base(name) for name in names] == ["plain", "plain, optimized"] * 3
    rows = {row.name: row for row in measured.rows}
    assert rows["injected"].parameters == rows["plain"].parameters + 2 * 16 * 8 + 16 + 8
    assert rows["injected"].flops == rows["plain"].flops + 4 * 16 * 8
    assert rows["plain, optimized"].bytes_moved < rows["plain"].bytes_moved < rows["injected"].bytes_moved
    assert rows["optimized"].bytes_training is None
    assert rows["peer"].bytes_training > rows["plain"].bytes_training > rows["plain"].bytes_saved > 0
    assert all(row.peak > 0 and not row.failures for row in measured.rows)


def test_times_are_of_the_same_rounds(measured):
    for row in measured.rows:
        assert list(row.timings) == (["eager"] if row.name.endswith("optimized") else ["eager", "training"])
        timing = row.timings["eager"]
        assert 0 < timing.p50 <= timing.p95
        assert timing.images_per_second == pytest.approx(2 / timing.p50 * 1000)
    assert {row.timings["eager"].ratio for row in measured.rows if row.name.startswith("plain")} == {1}


def test_the_result_is_plain_values_a_table_and_a_picture(measured, tmp_path, capsys):
    values = json.loads(json.dumps(measured.to_values()))
    assert values["shape"] == [2, 3, 224, 224]
    assert values["rows"][0]["name"] == "plain"
    assert measured.describe().startswith("2 x 3 x 224 x 224, fp32, contiguous, cpu, 1 threads, 3 rounds, torch ")
    print_speed(measured.rows)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith("peer, optimized") for line in lines) == 2
    for suffix in ("png", "svg"):
        draw_speed(measured.rows, measured.describe(), tmp_path / f"speed.{suffix}")
    assert (tmp_path / "speed.png").read_bytes()[1:4] == b"PNG"
    text = (tmp_path / "speed.svg").read_text()
    assert text.count("<svg") == 1


def test_a_network_keeps_its_device_mode_and_weights():
    torch.manual_seed(0)
    injected = inject(nets.wrap(nets.Residual(16)), r=4, example=torch.zeros(2, 3, 8, 8)).train()
    before = {name: value.clone() for name, value in injected.state_dict().items()}
    measure_network(injected, Conditions(rounds=1, compiled=False, channels_last=True, precision="bf16"))
    assert injected.training
    assert all(torch.equal(value, before[name]) for name, value in injected.state_dict().items())


def test_a_way_of_running_that_fails_is_said_in_the_row(monkeypatch, capsys):
    def refuse(model):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", refuse)
    networks = {"plain": nets.wrap(nets.Residual(16))}
    rows = compare_speed(networks, (1, 3, 8, 8), Conditions(rounds=1))
    assert [row.failures for row in rows] == [{"compiled": "no compiler here"}] * 2
    print_speed(rows)
    assert capsys.readouterr().out.count("no compiler here") == 2


def test_a_network_that_cannot_train_on_one_image_is_measured_without(capsys):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten())
    rows = compare_speed({"plain": network}, (1, 3, 8, 8), Conditions(rounds=1, compiled=False, training=True))
    assert rows[0].bytes_moved > 0
    assert rows[0].bytes_training is rows[0].peak_training is None
    assert rows[0].failures["training"].startswith("Expected more than 1 value per channel")
    print_speed(rows)
    assert "Expected more than 1 value per channel" in capsys.readouterr().out


def test_networks_of_one_class_are_compiled_one_by_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    networks = {name: nets.wrap(nets.Residual(16)) for name in ("plain", "second", "third")}
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = compare_speed(networks, (1, 3, 8, 8), Conditions(rounds=1))
    assert all(list(row.timings) == ["eager", "compiled"] and not row.failures for row in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"rounds": -1}, "rounds is -1; expected at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected fp32 or bf16"),
    ],
)
def test_conditions_out_of_range_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Conditions(**values)


def test_what_cannot_be_measured_says_why():
    model = nets.wrap(nets.Residual(16))
    with pytest.raises(ModelError, match="is optimized"):
        measure_network(optimize(inject(model, r=4)), QUICK)
    with pytest.raises(ExampleError, match=r"Sequential does not run on an input of shape \(2, 7, 8, 8\)"):
        compare_speed({"plain": nn.Sequential(nn.Flatten(), nn.Linear(3, 3))}, (1, 7, 8, 8), QUICK)


def test_the_command_prints_tables_or_json(tmp_path, capsys, monkeypatch):
    from se_inject import cli

    def run(*args):
        monkeypatch.setattr("sys.argv", ["se-inject", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    options = ("--no-pretrained", "--input-size", 64, "--rounds", 1, "--no-compile")
    code, printed = run("bench", "resnet18", *options, "--compare", "timm:seresnet18", "--plot", tmp_path / "a.svg")
    assert code == 0
    assert "timm:seresnet18, optimized" in printed.out
    assert (tmp_path / "a.svg").is_file()
    code, printed = run("bench", "resnet18", *options, "--json", "--batch", 2)
    values = json.loads(printed.out)
    assert values["shape"] == [2, 3, 64, 64]
    assert [row["name"] for row in values["rows"]] == ["plain", "plain, optimized", "injected", "optimized"]
    code, printed = run("bench", "resnet18", *options, "--plot", tmp_path / "a.txt")
    assert code == 1
    assert "has the suffix '.txt'; expected one of .png, .svg, .pdf" in printed.err
    code, printed = run("bench", "resnet18", "--no-pretrained", "--device", "cuda:99")
    assert code == 1
    assert "device is 'cuda:99', which cannot be used here" in printed.err
