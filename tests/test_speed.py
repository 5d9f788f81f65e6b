"""What is counted and timed side by side."""

import copy
import functools
import itertools
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from se_inject import blocks, eject, inject, optimize
from se_inject.errors import ExampleError, ModelError, OptionError
from se_inject.rewrite import get_plan
from se_inject.speed import COUNTED_STEP, Row, compare_speed, measure_network
from se_inject.speed_chart import draw_speed
from se_inject.speed_tables import print_speed
from se_inject.timing import Conditions, Timing, summarise_times
from se_inject.world import name_device
from tests import nets

QUICK = Conditions(batch_size=2, rounds=3, compiled=False, training=True)
ONCE = Conditions(rounds=1, compiled=False)


class Peer(nn.Module):
    """A network that does more than the plain one."""

    def __init__(self):
        super().__init__()
        self.body = nets.wrap(nets.Residual(16))

    def forward(self, x):
        return self.body(x * 1.5)


class TakesTargets(nets.Residual):
    """A network that gives a loss in train mode, as a detector does."""

    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode\nat all")
        return super().forward(x)


class GivesClasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nets.wrap(nets.Residual(16))

    def forward(self, x):
        return self.body(x).argmax(1)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    return measure_network(nets.wrap(nets.Residual(16)), QUICK, peers={"peer": Peer()}, options={"r": 4})


def test_each_network_is_measured_and_optimized(measured):
    names = [row.name for row in measured.rows]
    assert names == ["plain", "plain, optimized", "injected", "optimized", "peer", "peer, optimized"]
    assert [row.base for row in measured.rows] == ["plain", "plain, optimized"] * 3
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
    hardware = name_device(torch.device("cpu"))
    assert measured.describe().startswith(
        f"2 x 3 x 224 x 224, fp32, contiguous, {hardware}, 1 threads, 3 rounds, torch "
    )
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
    reason = rows[0].failures["training"]
    assert reason.startswith("Expected more than 1 value per channel")
    assert reason.endswith("; try --batch 2")
    assert rows[0].failures[COUNTED_STEP] == reason
    print_speed(rows)
    assert f"\nplain: no training step is counted: {reason}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nets.wrap(nets.Residual(16)).requires_grad_(False), "no output has a gradient"),
        (GivesClasses(), "no output has a gradient"),
        (nn.Sequential(nn.Conv2d(3, 16, 1), TakesTargets()), "targets should not be none when in training mode"),
    ],
    ids=["frozen", "integers", "targets"],
)
def test_a_network_that_cannot_be_trained_says_why_in_its_row(network, reason, capsys):
    networks = {"plain": nets.wrap(nets.Residual(16)), "peer": network}
    rows = {row.name: row for row in compare_speed(networks, (2, 3, 8, 8), QUICK)}
    assert rows["peer"].failures == {COUNTED_STEP: reason, "training": reason}
    assert rows["peer"].timings["eager"].p50 > 0
    assert rows["peer"].bytes_saved is None
    assert not any(row.failures for name, row in rows.items() if name != "peer")
    print_speed(list(rows.values()))
    printed = capsys.readouterr().out
    assert printed.count(f"peer: no training step is counted: {reason}\n") == 1
    assert COUNTED_STEP not in printed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_gets_images_of_its_own_type(dtype):
    torch.manual_seed(0)
    network = nets.wrap(nets.Residual(16))
    peers = {"peer": nets.wrap(nets.Residual(16))}
    other = copy.deepcopy(network).to(dtype)
    rows = measure_network(
        other, Conditions(input_size=8, rounds=1, compiled=False), peers=peers, options={"r": 4}
    ).rows
    assert all(row.timings["eager"].p50 > 0 for row in rows)
    parameters = {row.name: row.parameters for row in rows}
    moved = {row.name: row.bytes_moved for row in rows}
    assert parameters["plain"] == parameters["peer"]
    factor = torch.finfo(dtype).bits / 32
    assert moved["plain"] == pytest.approx(moved["peer"] * factor, rel=0.02)


@pytest.mark.parametrize("name", ["nets:make_optimized", "plainnets:three", "plain b", "not plain, optimized"])
def test_a_peers_name_does_not_decide_what_it_is_compared_to(name, tmp_path):
    networks = {"plain": nets.wrap(nets.Residual(16)), name: Peer()}
    rows = compare_speed(networks, (1, 3, 8, 8), ONCE)
    assert [row.base for row in rows] == ["plain", "plain, optimized"] * 2
    assert all(row.timings["eager"].ratio == 1 for row in rows[:2])
    draw_speed(rows, "", tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert [f"<!-- {row.name} -->" in drawn for row in rows] == [False, False, True, True]


@pytest.mark.parametrize("name", ["plain", "injected", "optimized", "plain, optimized", "a, optimized"])
def test_a_peer_that_is_named_as_another_row_is_refused(name):
    with pytest.raises(OptionError, match=f"^a peer is named '{name}', as another row is; give it a name of its own$"):
        measure_network(nets.wrap(nets.Residual(16)), ONCE, peers={"a": Peer(), name: Peer()})


def test_p95_is_what_one_round_in_twenty_takes_longer_than():
    seconds = [float(n) for n in range(1, 21)]
    assert summarise_times(seconds[::-1], None, 1).p95 == 19_000
    assert summarise_times(seconds * 2, None, 1).p95 == 19_000
    assert summarise_times(seconds[:19], None, 1).p95 == 19_000
    assert summarise_times([3.0], [2.0], 6).p95 == 3_000
    assert summarise_times([3.0], [2.0], 6).ratio == 1.5


def test_channels_last_is_for_maps():
    sound = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4))
    with pytest.raises(OptionError, match=r"^--channels-last is for inputs \(N, C, H, W\), .* \(1, 2, 64\); leave it"):
        compare_speed({"plain": sound}, (1, 2, 64), Conditions(rounds=1, compiled=False, channels_last=True))


@pytest.mark.parametrize("values", [{"batch_size": 10**8}, {"batch_size": 10**30}])
def test_images_that_do_not_fit_into_memory_say_which_options_make_them_smaller(values):
    match = (
        r"^out of memory with images of shape \(\d+, 3, \d+, \d+\); try a smaller --batch or a smaller --input-size$"
    )
    with pytest.raises(OptionError, match=match):
        measure_network(nets.wrap(nets.Residual(16)), Conditions(rounds=1, **values))


def test_images_that_no_plan_can_hold_are_refused():
    with pytest.raises(ExampleError, match=r"^the input size is 1000000, of which an input has [\d,]+ numbers; give a"):
        measure_network(nets.wrap(nets.Residual(16)), Conditions(rounds=1, input_size=10**6))


def test_a_network_that_runs_out_of_memory_says_so(monkeypatch):
    def fail(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    network = nets.wrap(nets.Residual(16))
    monkeypatch.setattr(nets.Residual, "forward", fail)
    with pytest.raises(OptionError, match=r"^out of memory with images of shape \(1, 3, 8, 8\); try a smaller --batch"):
        compare_speed({"plain": network}, (1, 3, 8, 8), ONCE)


def test_the_result_says_what_the_blocks_are():
    network = inject(nets.wrap(nets.Residual(16)), r=4, gate="tanh", example=torch.zeros(2, 3, 8, 8))
    for each, options in ((network, None), (eject(network), {"plan": get_plan(network)})):
        injection = measure_network(each, ONCE, options=options).to_values()["injection"]
        assert injection["gate"] == "tanh"
        assert injection["r"] == dict.fromkeys(blocks(network), 4)
        assert json.loads(json.dumps(injection)) == injection


def test_networks_of_one_class_are_compiled_one_by_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    networks = {name: nets.wrap(nets.Residual(16)) for name in ("plain", "second", "third")}
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = compare_speed(networks, (1, 3, 8, 8), Conditions(rounds=1))
    assert all(list(row.timings) == ["eager", "compiled"] and not row.failures for row in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "^--batch is 0; expected at least 1"),
        ({"input_size": 0}, "^--input-size is 0; expected at least 1"),
        ({"rounds": -1}, "^--rounds is -1; expected at least 1"),
        ({"threads": 0}, "^--threads is 0; expected at least 1"),
        ({"precision": "fp8"}, "^--precision is 'fp8'; expected fp32 or bf16"),
    ],
)
def test_conditions_out_of_range_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Conditions(**values)


def test_what_cannot_be_measured_says_why():
    model = nets.wrap(nets.Residual(16))
    optimized = optimize(inject(model, r=4))
    match = "^Sequential is optimized; bench takes the network that it was made from$"
    with pytest.raises(ModelError, match=match):
        measure_network(optimized, QUICK)
    with pytest.raises(ModelError, match="^fast.pt is optimized; "):
        measure_network(model, QUICK, peers={"fast.pt": optimized})
    match = r"^timm:three does not run on an input of shape \(1, 3, 8, 8\): mat1 and mat2 shapes cannot be multiplied"
    peer = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(ExampleError, match=match):
        compare_speed({"plain": model, "timm:three": peer}, (1, 3, 8, 8), QUICK)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_peer_that_cannot_be_optimized_is_named():
    scripted = torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match="^nets:scripted cannot be optimized: the model is scripted"):
        compare_speed({"plain": nets.wrap(nets.Residual(16)), "nets:scripted": scripted}, (1, 3, 8, 8), ONCE)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run the command line in a folder of its own; give exit code and what was printed."""
    from se_inject import cli

    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr("sys.argv", ["se-inject", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return run


OPTIONS = ("--no-pretrained", "--input-size", 32, "--rounds", 1, "--no-compile")


def test_the_command_prints_tables_or_json(tmp_path, run):
    code, printed = run("bench", "resnet18", *OPTIONS, "--compare", "timm:seresnet18", "--plot", tmp_path / "a.svg")
    assert code == 0
    assert "timm:seresnet18, optimized" in printed.out
    assert (tmp_path / "a.svg").is_file()
    code, printed = run("bench", "resnet18", *OPTIONS, "--json", "--batch", 2, "--r", 8, "--exclude", "layer1.*")
    values = json.loads(printed.out)
    assert values["model"] == "resnet18"
    assert values["shape"] == [2, 3, 32, 32]
    assert [row["name"] for row in values["rows"]] == ["plain", "plain, optimized", "injected", "optimized"]
    assert [row["base"] for row in values["rows"]] == ["plain", "plain, optimized"] * 2
    assert set(values["injection"]["r"].values()) == {8}
    assert "layer1.0.se" not in values["injection"]["r"]
    assert values["hardware"] == name_device(torch.device("cpu"))
    code, printed = run("bench", "resnet18", *OPTIONS, "--plot", tmp_path / "a.txt")
    assert code == 1
    assert "has the suffix '.txt'; expected one of .png, .svg, .pdf" in printed.err
    code, printed = run("bench", "resnet18", "--no-pretrained", "--device", "cuda:99")
    assert code == 1
    assert "device is 'cuda:99', which cannot be used here" in printed.err


def test_peers_are_opened_as_the_network_is_and_get_its_classes_and_channels(run, tmp_path):
    (tmp_path / "bench_shop.py").write_text(
        "import timm\ndef make(): return timm.create_model('resnet10t', in_chans=1)\n"
    )
    assert run("resnet10t", "--no-pretrained", "--num-classes", 5, "--in-chans", 1, "--out", "model.pt")[0] == 0
    peers = ("timm:resnet10t", "bench_shop:make", "model.pt")
    compared = [word for peer in peers for word in ("--compare", peer)]
    code, printed = run("bench", "model.pt", *OPTIONS[1:], "--json", *compared)
    assert code == 0, printed.err
    parameters = {row["name"]: row["parameters"] for row in json.loads(printed.out)["rows"]}
    assert parameters["timm:resnet10t"] == parameters["plain"]
    assert parameters["model.pt"] == parameters["injected"]
    # 1000 classes in place of 5, each with 512 weights and a bias.
    assert parameters["bench_shop:make"] == parameters["plain"] + 995 * 513
    command = ("bench", "timm:resnet10t", *OPTIONS, "--in-chans", 1, "--compare", "torchvision:resnet18")
    code, printed = run(*command)
    assert code == 1
    assert "torchvision:resnet18 takes three channels" in printed.err
    command = ("bench", "resnet10t", *OPTIONS, "--in-chans", 3, "--num-classes", 5, "--compare", "torchvision:resnet18")
    code, printed = run(*command, "--json")
    assert code == 0, printed.err
    assert {row["name"]: row["parameters"] for row in json.loads(printed.out)["rows"]}["torchvision:resnet18"] == (
        11_689_512 - 995 * 513
    )


def test_what_the_command_cannot_measure_gets_one_line(run, tmp_path):
    (tmp_path / "model.pt2").touch()
    assert run("resnet10t", "--no-pretrained", "--out", "model.pt")[0] == 0
    assert run("export", "model.pt", "--optimize", "--out", "fast.pt")[0] == 0
    for args, message in (
        (("fast.pt",), "ResNet is optimized; bench takes the network that it was made from"),
        (("model.pt2",), "model.pt2 is a program, which has no layers to work on; expected an artifact (.pt, .pth"),
        (("resnet10t", "--no-pretrained", "--compare", "model.pt2"), "model.pt2 is a program"),
        (("resnet10t", "--no-pretrained", "--batch", 0), "--batch is 0; expected at least 1"),
        (("resnet10t", "--no-pretrained", "--batch", 10**8), "try a smaller --batch or a smaller --input-size"),
    ):
        code, printed = run("bench", *args, "--no-compile", "--rounds", 1)
        assert code == 1
        line = printed.err.splitlines()[-1]
        assert message in line
        assert "Traceback" not in printed.err


@pytest.mark.parametrize("num", [1, 3, 9])
def test_the_chart_has_room_for_the_bars_and_the_names_of_many_peers(num, tmp_path, monkeypatch):
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    names = [f"timm:a_long_name_of_a_network_{i}" for i in range(num)]
    rows = [make_row("plain", "plain"), make_row("plain, optimized", "plain, optimized")]
    rows += [make_row(name, "plain") for name in names]
    draw_speed(rows, "a title " * 15, tmp_path / "speed.png")
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert legend._ncols == min(4, num)
    numbers = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert len(numbers) == 2 * num
    assert not any(one.overlaps(other) for one, other in itertools.combinations(numbers, 2))
    drawn = np.asarray(Image.open(tmp_path / "speed.png").convert("L"))
    assert min(edge.min() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1])) == 255  # nothing is cut


def make_row(name, base):
    timing = Timing(1, 1, 1, 1.25)
    return Row(name, base, 1, 1, 1, None, None, 1, None, {"eager": timing}, {})
