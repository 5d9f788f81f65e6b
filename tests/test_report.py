import functools
import gc
import inspect
import json
import math
import os
import shlex
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
import typer
from PIL import Image
from torch.utils.data import Dataset, Subset

from se_inject import blocks, inject, save
from se_inject.arguments import open_model, read_validation, write_words
from se_inject.cli import app, main
from se_inject.comparison import Result
from se_inject.datasets import Data, open_data
from se_inject.errors import DataError, ModelError, OptionError
from se_inject.formats import InputFormat
from se_inject.gate_statistics import collect_gates
from se_inject.gates import Passed
from se_inject.loaders import EvalLoader
from se_inject.provenance import Source
from se_inject.report import Wishes, make_report
from se_inject.report_blocks import Ablation, advise, measure_ablation
from se_inject.report_charts import draw_panel, write_figures
from se_inject.report_classes import ClassFacts, Panel, Profile, choose_classes, choose_evenly, find_classes
from se_inject.report_images import Farthest
from se_inject.report_network import compare_arms, read_results
from se_inject.report_page import make_page
from se_inject.report_style import import_altair, write_picture
from se_inject.scores import Scores
from se_inject.timing import Conditions
from se_inject.validation import Validation
from se_inject.world import World
from tests.digits import DigitNet, write_digits
from tests.images_on_disk import make_image, make_shards

QUICK = Wishes(conditions=Conditions(rounds=1, compiled=False))
HOSTILE = "<img src=x onerror=alert(1)>"


class InMemory(Dataset):
    """Grey images of some classes, in memory."""

    def __init__(self, num, classes):
        self.classes = list(classes)
        self.targets = [i % len(self.classes) for i in range(num)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return make_image(index, (8, 8), "L"), self.targets[index]


def make_network(num_classes=10, *, is_trained=True):
    torch.manual_seed(0)
    model = inject(DigitNet(num_classes), example=torch.zeros(2, 1, 8, 8)).eval()
    for block in blocks(model).values() if is_trained else ():
        torch.nn.init.normal_(block.fc2.weight)
    return model


def make_validation(images, classes, num_classes, batch_size=32):
    loader = EvalLoader(
        images, InputFormat((1, 8, 8), (0.5,), (0.5,)), batch_size=batch_size, workers=0,
        world=World(torch.device("cpu")), num_classes=num_classes, cache=2**20,
    )  # fmt: skip
    return Validation(
        Data(None, images, classes, num_classes, "memory"), loader, World(torch.device("cpu")), num_classes
    )


def make_small(num=60, classes=tuple("abcdefghij"), **options):
    return make_validation(InMemory(num, classes), tuple(classes), len(classes), **options)


@pytest.fixture(scope="module")
def report():
    return make_report(make_network(), make_small(), QUICK)


def make_scores(confusion, hits=None, loss=0.0):
    return Scores(torch.tensor(confusion), 0, loss, None if hits is None else torch.tensor(hits))


# What a block costs


def test_the_error_of_a_lost_accuracy_is_of_paired_differences():
    before = make_scores([[3, 2], [0, 0]], [1, 1, 1, 0, 0, 2], loss=0.5)
    after = make_scores([[2, 3], [0, 0]], [1, 0, 0, 1, 0, 2], loss=0.75)
    found = measure_ablation(before, after)
    # Of 5 images 2 became wrong and 1 right; with half an image more in each cell: sqrt(4 - 1 / 7) / 7.
    assert (found.lost, found.error, found.loss) == (pytest.approx(20), pytest.approx(28.0566, abs=1e-3), 0.25)
    assert found.is_paired


def test_a_stream_has_the_larger_error_of_two_scores():
    before, after = make_scores([[90, 10], [0, 0]]), make_scores([[90, 10], [0, 0]])
    found = measure_ablation(before, after)
    share = 90.5 / 101
    assert found.error == pytest.approx(100 * math.sqrt(2 * share * (1 - share) / 100))
    assert not found.is_paired


@pytest.mark.parametrize(
    ("lost", "error", "offset", "obstacle", "action", "reason"),
    [
        (1.0, 0.2, 0.2, None, "keep", "a fixed gate costs 1.00 ± 0.39 points of top-1"),
        (0.0, 0.1, 0.2, None, "fold", "a fixed gate costs at most 0.20 points of top-1 (95 %)"),
        (-0.5, 0.1, 0.2, None, "fold", "a fixed gate costs at most 0.00 points of top-1 (95 %)"),
        (0.0, 0.1, 0.004, None, "remove",
         "a fixed gate costs at most 0.20 points of top-1 (95 %), and its mean gate is 1 within 0.4 %"),
        (0.0, 0.1, 0.2, "no layer", "keep", "its gate cannot be folded: no layer"),
        (0.0, 1.0, 0.2, None, "keep", "1,000 images cannot tell: a fixed gate may cost up to 1.96 points of top-1"),
        (-3.0, 5.0, 0.0, None, "keep", "1,000 images cannot tell: a fixed gate may cost up to 6.80 points of top-1"),
    ],
)  # fmt: skip
def test_what_is_advised_rests_on_evidence(lost, error, offset, obstacle, action, reason):
    ablation = Ablation(lost, error, is_paired=True, loss=0.0)
    assert advise(ablation, offset, obstacle, 1000) == (action, reason)


def test_each_block_is_scored_with_its_mean_gate(report):
    model, validation = make_network(), make_small()
    gates = collect_gates(model, validation.loader)
    before = validation.score(model)
    for path, block in blocks(model).items():
        mean = torch.from_numpy(gates[path]["overall_mean"].to_numpy()).float()
        kept, block.forward = block.forward, lambda x, mean=mean, **shortcut: scale(x, mean, **shortcut)
        after = validation.score(model)
        block.forward = kept
        found = next(each for each in report.blocks if each.path == path).ablation
        assert found.lost == pytest.approx(before.top1 - after.top1)
        assert found.loss == pytest.approx(after.loss - before.loss, abs=1e-5)


def scale(x, mean, shortcut=None):
    scaled = x * mean[None, :, None, None]
    return scaled if shortcut is None else scaled + shortcut


# The whole


def test_a_report_leaves_the_network_as_it_is():
    model = make_network().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = list(map(id, model.modules()))
    make_report(model, make_small(20), QUICK)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(map(id, model.modules())) == modules
    assert model.training


def test_a_report_is_plain_numbers(report):
    values = json.loads(json.dumps(report.to_values()))
    assert [each["path"] for each in values["blocks"]] == [each.path for each in report.list_by_cost()]
    assert values["scores"]["num_images"] == 60
    assert len(values["per_class"]) == 10
    assert sum(report.count_actions().values()) == 3
    assert [panel["stage"] for panel in values["panels"]] == [0, 1]
    parameters = {row["name"]: row["parameters"] for row in values["costs"]["rows"]}
    added = sum(p.numel() for block in blocks(make_network()).values() for p in block.parameters())
    assert parameters["injected"] - parameters["plain"] == added
    assert len(values["images"]["farthest"]) == 12
    assert "thumbnail" not in values["images"]["farthest"][0]
    assert all(sum(each["histogram"]) == pytest.approx(1) for each in values["blocks"])


def test_progress_counts_the_passes():
    told = []
    make_report(make_network(), make_small(20), QUICK, tell=lambda *args: told.append(args))
    assert [done for _, done, _ in told] == [0, 1, 2, 3, 4, 5, 6]
    assert {total for *_, total in told} == {6}
    assert told[1][0] == "block1.se with its mean gate"


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ModelError, match="has not been injected"):
        make_report(DigitNet(), make_small(), QUICK)


def test_gates_that_were_never_trained_are_not_plotted():
    with pytest.raises(ModelError, match="is 1 for every image: its 3 blocks were never trained"):
        make_report(make_network(is_trained=False), make_small(), QUICK)


def test_one_image_tells_nothing_and_says_so():
    found = make_report(make_network(), make_small(1), QUICK)
    assert {each.class_share for each in found.blocks} == {None}
    assert {each.action for each in found.blocks} == {"keep"}
    assert "1 image cannot tell" in found.blocks[0].reason
    assert found.panels[0].profiles[0].deviations[1] is None
    page = make_page(found)
    assert "not known" in page
    assert "on 1 image of" in page


def test_a_block_that_does_not_exist_is_named():
    with pytest.raises(OptionError, match=r"blok1.se is no block of the network; it has 3, such as block1.se"):
        make_report(make_network(), make_small(), replace(QUICK, block="blok1.se"))


# Classes


def test_classes_are_found_by_name_even_with_commas():
    assert find_classes("dog, tench, Tinca tinca", ["cat", "dog", "tench, Tinca tinca"]) == [1, 2]


def test_all_unknown_classes_are_named_with_the_closest():
    with pytest.raises(DataError, match=r"no such class: 'Dogg' \(like dog\); 'xyz'; there are 2: cat, dog"):
        find_classes("cat,Dogg,xyz", ["cat", "dog"])


def test_more_classes_than_can_be_told_apart_are_refused():
    with pytest.raises(OptionError, match="names 6 classes; at most 5"):
        find_classes("a,b,c,d,e,f", list("abcdef"))


def test_the_most_and_the_least_confused_classes_are_chosen():
    right = [5, 1, 9, 7, 0, 3, 8]
    confusion = torch.diag(torch.tensor(right))
    for i, num in enumerate(right):
        confusion[i, (i + 1) % 7] += 10 - num
    confusion[4] = 0  # no image of e
    found = choose_classes(Scores(confusion, 0, 0.0), list("abcdefg"))
    assert [each.name for each in found] == ["b", "f", "g", "c"]
    assert (found[0].num_images, found[0].top1, found[0].taken_for) == (10, 10.0, ("c", 9))


def test_few_classes_are_all_shown():
    found = choose_classes(make_scores([[2, 1], [0, 4]]), ["cat", "dog"])
    assert [(each.name, each.taken_for) for each in found] == [("cat", ("dog", 1)), ("dog", None)]


def test_a_class_without_images_cannot_be_shown():
    with pytest.raises(DataError, match="there is no image of dog"):
        choose_classes(make_scores([[2, 1], [0, 0]]), ["cat", "dog"], [1])


def test_the_first_and_the_last_are_among_the_chosen():
    assert choose_evenly(3, 4) == [0, 1, 2]
    assert choose_evenly(23, 4) == [0, 7, 15, 22]
    assert choose_evenly(256, 64)[:3] + choose_evenly(256, 64)[-1:] == [0, 4, 8, 255]


def test_profiles_are_the_means_by_class(report):
    gates = collect_gates(make_network(), make_small().loader, classes=tuple("abcdefghij"))
    profile = report.panels[1].profiles[0]
    assert profile.path == "down.se"
    for each, means in zip(report.classes, profile.means[1:], strict=True):
        assert means == pytest.approx(gates["down.se"]["mean"].sel({"class": each.name}).to_numpy(), abs=1e-5)


# Images


def test_the_farthest_images_are_kept_over_batches():
    gates = torch.tensor([[1.0, 1.0], [1.0, 1.2], [0.0, 0.0], [1.0, 1.1], [1.3, 1.3], [1.2, 1.0]])
    farthest = Farthest("se", torch.ones(2, dtype=torch.float64), num=3)
    for batch, labels in ((gates[:3], [0, 0, -2]), (gates[3:], [0, -1, 1])):
        farthest.add({"se": Passed(batch, batch)}, torch.tensor(labels))
    # The third image could not be read; of the equal ones the first is kept.
    found = farthest.list_farthest()
    assert [index for index, _ in found] == [4, 1, 5]
    assert [distance for _, distance in found] == pytest.approx([0.3, 0.1414, 0.1414], abs=1e-4)


def test_images_that_stand_out_are_those_of_the_set(report):
    validation, path = make_small(), report.list_by_cost()[0].path
    gates = collect_gates(make_network(), validation.loader, keep_images=True)[path]["gate"].to_numpy()
    distances = ((gates - gates.mean(0)) ** 2).mean(1) ** 0.5
    assert report.block == path
    assert [each.index for each in report.pictures] == distances.argsort()[::-1][:12].tolist()
    hits = report.scores.hits
    for each in report.pictures:
        assert each.label == "abcdefghij"[each.index % 10]
        assert each.is_right == bool(hits[each.index])
        assert each.uri.startswith("data:image/jpeg;base64,")


def test_images_of_a_subset_are_found_by_their_own_numbers():
    images = Subset(InMemory(30, "abcdefghij"), range(10, 30))
    found = make_report(
        make_network(), make_validation(images, tuple("abcdefghij"), 10), replace(QUICK, block="down.se")
    )
    assert found.block == "down.se"
    assert all(each.label == "abcdefghij"[each.index % 10] for each in found.pictures)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files open
def test_images_of_a_stream_are_not_shown(tmp_path):
    pytest.importorskip("webdataset")
    make_shards(tmp_path, "validation", [0, 1] * 10, [10, 10], size=(8, 8))
    data = open_data(f"wds/:{tmp_path}", is_evaluation=True, mode="L")
    found = make_report(make_network(2), make_validation(data.val, None, 2), QUICK)
    assert found.pictures is None
    assert not found.blocks[0].ablation.is_paired
    page = make_page(found)
    assert "cannot be read again to be shown" in page
    assert "cannot be paired" in page
    gc.collect()  # of the open files, while the warning is ignored


# The control


def write_results(folder, arms=(("se", 0, 85.0), ("control", 0, 84.0), ("se", 1, 86.0), ("control", 1, 84.5))):
    for arm, seed, top1 in arms:
        (folder / f"{arm}-{seed}").mkdir(parents=True)
        result = Result(arm, seed, 80.0 + seed, top1, 10, 1.0, 1.0, "1" * 10, [])
        (folder / f"{arm}-{seed}" / "result.json").write_text(json.dumps(asdict(result)))


def test_the_control_is_that_of_the_comparison(tmp_path):
    write_results(tmp_path)
    found = compare_arms(read_results(tmp_path), tmp_path)
    assert (found.before, found.se, found.control, found.seeds) == (80.5, 85.5, 84.25, (0, 1))
    assert found.difference.points == 1.25
    assert "over 2 seeds" in found.verdict


def test_seeds_that_one_arm_lacks_are_left_out(tmp_path):
    write_results(tmp_path, (("se", 0, 85.0), ("control", 0, 84.0), ("se", 1, 86.0)))
    assert {result.seed for result in read_results(tmp_path)} == {0}


def test_a_folder_without_a_comparison_has_no_results(tmp_path):
    assert read_results(tmp_path / "nowhere") == []
    assert compare_arms([], tmp_path) is None


def test_a_broken_result_is_named(tmp_path):
    write_results(tmp_path)
    (tmp_path / "se-0" / "result.json").write_text("{}")
    with pytest.raises(DataError, match=r"se-0/result.json is no result of se-inject finetune: KeyError"):
        read_results(tmp_path)


# The page


def test_the_page_has_every_section(report, tmp_path):
    write_results(tmp_path)
    results = read_results(tmp_path)
    page = make_page(replace(report, control=compare_arms(results, tmp_path), command="se-inject simplify a.pt"))
    for expected in (
        "The network before and after", "Gates by class", "Images that stand out", "What to do", "block2.se",
        "control, without blocks", "84.25 %", "over 2 seeds", "se-inject simplify a.pt", 'lang="en"', "viewport",
    ):  # fmt: skip
        assert expected in page, expected
    assert page.count("<li><img") == 12


def test_a_thousand_classes_fit_into_five_megabytes():
    classes = tuple(f"a rather long name of a class, as ImageNet has them, number {i}" for i in range(1000))
    found = make_report(make_network(1000), make_validation(InMemory(1500, classes), classes, 1000, 256), QUICK)
    assert len(found.classes) == 4
    assert len(make_page(found).encode()) < 5e6


def test_names_of_classes_and_files_are_not_markup():
    classes = (HOSTILE, "</script><script>alert(2)</script>", '"quoted"')
    page = make_page(make_report(make_network(3), make_validation(InMemory(12, classes), classes, 3), QUICK))
    assert HOSTILE not in page
    assert "<script>alert(2)" not in page
    assert page.count("</script>") == 3


def test_figures_are_written_as_pixels_and_vectors(report, tmp_path):
    written = write_figures(report, tmp_path)
    assert [path.name for path in written] == [
        "gates-by-class-stage-0", "gates-by-class-stage-1", "distribution", "variation", "accuracy-lost", "loss-added",
    ]  # fmt: skip
    for path in written:
        with Image.open(path.with_name(path.name + ".png")) as image:
            assert image.width > 300
        assert "var(" not in path.with_name(path.name + ".svg").read_text()
    vectors = (tmp_path / "gates-by-class-stage-1.svg").read_text()
    assert all(text in vectors for text in (">channel</text>", ">mean gate</text>", ">all images</text>"))


@pytest.mark.parametrize(
    ("means", "limits", "drawn", "form"),
    [
        ((1.000622, 1.0006243, 1.0006171), [1.00061674, 1.00062466], [1.000622, 1.0006243, 1.0006171], ".9f"),
        ((0.1234567, 0.9876543, 0.5), [0.0802, 1.0309], [0.1235, 0.9877, 0.5], ".4f"),
        ((1234.5678, 1.0, 2.0), [-61.0, 1296.0], [1235.0, 1.0, 2.0], ".4f"),
        ((0.4, 0.4, 0.4000000000000001), [0.35, 0.45], [0.4, 0.4, 0.4], ".4f"),
    ],
)
def test_gates_are_rounded_as_finely_as_their_axis_asks(means, limits, drawn, form):
    panel = Panel(0, (Profile("se", (0, 1, 2), (means, means), (None, None)),), ())
    values = draw_panel(panel, [ClassFacts("cat", 0, 1, 100.0, None)])[0].drawing.to_dict()
    rows = next(rows for rows in values["datasets"].values() if len(rows) == 3)
    assert [row["m1"] for row in rows] == drawn
    lines = next(layer for layer in values["layer"] if layer["mark"]["type"] == "line")
    assert lines["encoding"]["y"]["scale"]["domain"] == pytest.approx(limits, rel=1e-12)
    assert min(drawn) > limits[0]
    assert max(drawn) < limits[1]
    texts = [each["calculate"] for each in values["layer"][-1]["transform"]]
    assert all(f"'{form}'" in text for text in texts)


def test_the_line_at_1_is_no_longer_than_its_axis():
    panel = Panel(0, (Profile("se", (0, 1), ((0.4, 0.400001),), (None,)),), ())
    values = draw_panel(panel, [])[0].drawing.to_dict()
    rule = next(layer for layer in values["layer"] if layer["encoding"]["y"] == {"datum": 1})
    assert rule["mark"]["clip"]  # else the picture reaches from the gates to 1, which takes all memory


@pytest.mark.parametrize("name", ["altair", "jinja2", "vl_convert"])
def test_what_is_not_installed_is_named(report, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=rf"needs {name}: pip install 'se-inject\[report\]'"):
        make_page(report)


# The command line


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_digits(folder / "digits", 200)
    save(make_network(), folder / "tuned.pt", source=Source("factory", "tests.digits:DigitNet", {}))
    save(make_network(is_trained=False), folder / "fresh.pt", source=Source("factory", "tests.digits:DigitNet", {}))
    return folder


@pytest.fixture
def run(capsys, monkeypatch, digits):
    def run(*args):
        monkeypatch.chdir(digits)
        monkeypatch.setattr(sys, "argv", ["se-inject", "report", *map(str, args), "--trust-source", "--workers", "0"])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_name_that_is_no_utf8_can_be_drawn(tmp_path):
    rows = [{"name": os.fsdecode(b"caf\xe9"), "value": 1}]
    drawing = import_altair().Chart(import_altair().InlineData(values=rows)).mark_bar().encode(x="value:Q", y="name:N")
    write_picture(drawing.properties(width=100), tmp_path / "bars")
    assert "caf?" in (tmp_path / "bars.svg").read_text()


def test_the_command_writes_the_page_the_numbers_and_the_figures(run, digits):
    write_results(digits / "runs" / "tuned")
    code, out, _ = run(
        "tuned.pt", "--data", "digits", "--classes", "3,8", "--block", "down.se", "--json", "--png", "figures"
    )
    values = json.loads(out)
    assert code == 0
    assert {each["name"] for each in values["classes"]} == {"3", "8"}
    assert values["images"]["block"] == "down.se"
    assert values["control"]["control"] == 84.25
    command = "se-inject simplify tuned.pt --trust-source --data digits --workers 0 --max-drop 0.1 --out smaller.pt"
    assert values["command"] == command
    assert command in (digits / "report.html").read_text()
    assert (digits / "figures" / "variation.svg").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["tuned.pt", "--data", "digits"],
        ["resnet18", "--weights", "my weights.pt", "--num-classes", "10", "--in-chans", "1", "--adapter", "it's.pt",
         "--data", "torch/cifar10:my data", "--val-split", "test", "--download"],
        ["mine:make", "--no-pretrained", "--trust-source", "--data", "digits", "--split", "runs/a b/split.json",
         "--batch-size", "8", "--workers", "0", "--input-size", "32", "--max-bad", "3"],
    ],
)  # fmt: skip
def test_the_advised_command_opens_what_the_report_was_made_of(words):
    command = typer.main.get_command(app)

    def read(verb, words):
        values = command.commands[verb].make_context(verb, list(words)).params
        names = {**inspect.signature(open_model).parameters, **inspect.signature(read_validation).parameters}
        return {name: values[name] for name in names}

    given = read("report", words)
    readers = [
        functools.partial(reader, **{name: given[name] for name in inspect.signature(reader).parameters})
        for reader in (open_model, read_validation)
    ]
    written = [word for reader in readers for word in write_words(reader)]
    assert written == words
    assert read("simplify", written) == given


def test_the_advised_command_can_be_given_to_a_shell(run, digits):
    shutil.copy(digits / "tuned.pt", digits / "it's tuned.pt")
    code, out, _ = run("it's tuned.pt", "--data", "digits", "--max-bad", "2", "--device", "cpu", "--json")
    assert code == 0
    expected = ["se-inject", "simplify", "it's tuned.pt", "--trust-source", "--data", "digits", "--workers", "0"]
    expected += ["--max-bad", "2", "--device", "cpu", "--max-drop", "0.1", "--out", "smaller.pt"]
    assert shlex.split(json.loads(out)["command"]) == expected


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["fresh.pt", "--data", "digits"], "3 blocks were never trained"),
        (["tuned.pt", "--data", "digits", "--classes", "33"], "no such class: '33' (like 3)"),
        (["tuned.pt", "--data", "digits", "--block", "fc"], "fc is no block of the network"),
        (["tuned.pt", "--data", "digits", "--run", "digits"], "digits holds no comparison"),
        (["tuned.pt", "--data", "digits", "--out", "report.pdf"], "has the suffix '.pdf'"),
        (["tuned.pt", "--data", "digits", "--png", "tuned.pt"], "--png is tuned.pt, which cannot be made"),
        (["tuned.pt", "--data", "empty"], "holds no images"),
    ],
)
def test_bad_input_is_said_in_one_line(run, digits, args, error):
    (digits / "empty").mkdir(exist_ok=True)
    code, out, err = run(*args)
    assert (code, out) == (1, "")
    line = " ".join(err.splitlines()[-1].split())
    assert line.startswith("error: ")
    assert error in line
