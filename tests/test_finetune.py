"""`se-inject finetune` and `evaluate`, from the command line, on scikit-learn's digits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from se_inject import blocks, inject, load, save
from se_inject.datasets import open_data
from se_inject.experiment import hold_folder
from se_inject.gates import is_fresh
from se_inject.provenance import Source
from se_inject.runlog import METRICS, read_metrics
from tests.digits import DigitNet, write_digits
from tests.test_cli import failure, run  # noqa: F401

NET = "tests.digits:DigitNet"
QUICK = "--set batch_size=16 --set crop=none --set hflip=0 --set workers=0 --r 4 --input-size 8".split()
LAUNCHED = ["--reduction-ratio" if x == "--r" else x for x in QUICK] + ["--device", "cpu"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Cosine annealing scheduler:UserWarning"),
    pytest.mark.slow,
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 160)


@pytest.fixture
def artifact(tmp_path):
    torch.manual_seed(0)
    model = inject(DigitNet(), r=4, example=torch.zeros(2, 1, 8, 8))
    save(model, tmp_path / "model.pt", source=None)
    return tmp_path / "model.pt"


def tune(run, data, *args):  # noqa: F811
    return run("finetune", NET, "--data", data, *QUICK, "--epochs", "1", *args)


def test_a_name_is_injected_and_tuned_and_the_file_can_be_read(run, data):  # noqa: F811
    code, out, err = tune(run, data, "--out", "tuned.pt")
    assert code == 0, err
    assert "with SE" in out
    assert "tuned.pt: the tuned network; runs/tuned: checkpoints, metrics and curves" in out
    model = load("tuned.pt", trust_source=True)
    assert blocks(model)
    assert not is_fresh(model)
    names = {path.name for path in Path("runs/tuned").iterdir()}
    assert {"checkpoint.pt", "metrics.jsonl", "curves.png", "result.json", "recipe.json", "last.pt", "best.pt"} <= names
    image = next((data / "val" / "7").iterdir())
    code, out, _ = run("predict", "tuned.pt", "--trust-source", "--top-k", "10", "--json", image)
    assert {item["name"] for item in json.loads(out)[str(image)]} == set("0123456789")
    code, out, _ = run("evaluate", "tuned.pt", "--trust-source", "--data", data, "--json", "--workers", "0")
    values = json.loads(out)
    assert values["top1"] == json.loads(Path("runs/tuned/result.json").read_text())["top1"]
    assert {"top1", "top5", "per_class", "confusion"} <= set(values)
    assert sum(map(sum, values["confusion"])) == 40
    assert list(values["per_class"]) == [str(i) for i in range(10)]


def test_evaluate_says_which_images_it_scored(run, data):  # noqa: F811
    torch.save(DigitNet().state_dict(), "weights.pt")
    args = ["evaluate", NET, "--weights", "weights.pt", *common(data)]
    args.remove("--json")
    for options, num, part in (([], 40, "val"), (["--val-split", "train"], 120, "train")):
        code, out, _ = run(*args, *options)
        assert code == 0
        assert f", {num} images of {data / part}\n" in out


def test_the_original_and_the_injected_network_have_the_same_numbers(run, data, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    torch.save(DigitNet().state_dict(), "weights.pt")
    model = DigitNet()
    model.load_state_dict(torch.load("weights.pt"))
    save(inject(model, r=4, example=torch.zeros(2, 1, 8, 8)), "model.pt", source=Source("factory", NET))
    before = json.loads(run("evaluate", NET, "--weights", "weights.pt", *common(data))[1])
    after = json.loads(run("evaluate", "model.pt", "--trust-source", *common(data))[1])
    assert before == after


def common(data):
    return ["--data", data, "--json", "--workers", "0", "--input-size", "8"]


def test_a_comparison_ends_with_a_table_and_one_sentence(run, data):  # noqa: F811
    code, out, err = tune(run, data, "--compare", "--seeds", "2", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert [(r["arm"], r["seed"]) for r in values["results"]] == [("se", 0), ("control", 0), ("se", 1), ("control", 1)]
    first, second = (ours["top1"] - theirs["top1"] for ours, theirs in (values["results"][:2], values["results"][2:]))
    is_same = abs(first - second) < 1e-9
    assert values["difference"]["basis"] == ("the same with all 2 seeds" if is_same else "over 2 seeds")
    assert values["difference"]["verdict"] in ("helped", "made no difference", "hurt")
    assert len({r["before"] for r in values["results"]}) == 1
    assert values["results"][0]["parameters"] > values["results"][1]["parameters"]
    assert {"se-0", "control-0", "se-1", "control-1", "curves.png"} <= {p.name for p in Path("runs/tuned").iterdir()}
    before = Path("tuned.pt").read_bytes()
    code, out, err = tune(run, data, "--compare", "--seeds", "2", "--resume")
    assert code == 0, err
    assert "SE " in out
    assert Path("tuned.pt").read_bytes() == before


def test_it_says_that_the_blocks_were_faster(run, data, monkeypatch):  # noqa: F811
    args = ["--set", "batch_norm=train", "--epochs", "0.2"]
    assert "gates of their own" not in tune(run, data, *args, "--out", "slow.pt")[2]
    monkeypatch.setattr("se_inject.calibration.measure_dependence", lambda *_, **__: 0.02)
    _, _, err = tune(run, data, *args, "--out", "fast.pt")
    assert "the blocks learned at ten times the backbone's rate: the images want gates of their own" in err
    found = [json.loads(Path(f"runs/{n}/result.json").read_text())["history"][0] for n in ("slow", "fast")]
    assert [(each["se_lr"], each["dependence"]) for each in found] == [(0.01, 0.0), (0.1, 0.02)]


def test_another_number_of_classes_replaces_the_classifier(run, tmp_path):  # noqa: F811
    few = write_digits(tmp_path / "few", 160)
    for folder in (few / "train", few / "val"):
        for name in "3456789":
            for file in (folder / name).iterdir():
                file.unlink()
            (folder / name).rmdir()
    code, _, err = tune(run, few, "--out", "tuned.pt")
    assert code == 0, err
    assert load("tuned.pt", trust_source=True).fc.out_features == 3


def test_a_single_folder_is_split_and_the_split_written_down(run, data):  # noqa: F811
    code, _, err = tune(run, data / "train", "--out", "tuned.pt")
    assert code == 0, err
    assert "25 of 120 images were held back; --split runs/tuned/split.json scores them alone" in err
    found = json.loads(Path("runs/tuned/result.json").read_text())
    scored = ["evaluate", "tuned.pt", "--trust-source", "--data", data / "train", "--split", "runs/tuned/split.json"]
    assert json.loads(run(*scored, "--json")[1])["top1"] == found["top1"]
    split = json.loads(Path("runs/tuned/split.json").read_text())
    assert len(split["train"]) + len(split["val"]) == 120
    assert not set(split["train"]) & set(split["val"])
    opened = open_data(str(data / "train"), mode="L", seed=0)
    assert isinstance(opened.train, Subset)


def test_a_timm_network_of_grey_images(run, data):  # noqa: F811
    args = ["--no-pretrained", "--in-chans", "1", "--input-size", "32", "--set", "batch_size=16", "--set", "workers=0"]
    code, _, err = run("finetune", "resnet10t", "--data", data, *args, "--epochs", "0.2", "--out", "tuned.pt")
    assert code == 0, err
    model = load("tuned.pt")
    assert (model.num_classes, model.conv1[0].in_channels) == (10, 1)
    code, out, err = run("predict", "tuned.pt", next((data / "val" / "3").iterdir()))
    assert code == 0, err


def test_unlabelled_images_will_do_for_distillation(run, data, tmp_path):  # noqa: F811
    pile = tmp_path / "pile"
    (pile / "train").mkdir(parents=True)
    for i, file in enumerate((data / "train").rglob("*.png")):
        (pile / "train" / f"{i}.png").write_bytes(file.read_bytes())
    (pile / "val").symlink_to(data / "val")
    code, _, err = tune(run, pile, "--recipe", "distill", "--out", "tuned.pt")
    assert code == 0, err
    error = failure(tune(run, pile, "--out", "other.pt"))
    assert "classes" in error
    _, _, err = tune(run, pile / "train", "--recipe", "distill", "--out", "single.pt")
    assert "24 of 120 images were held back\n" in err  # without labels there is nothing to score


def test_it_says_how_many_images_of_small_classes_were_held_back(run, data):  # noqa: F811
    for folder in sorted((data / "train").iterdir()):
        few = Path("few") / folder.name
        few.mkdir(parents=True)
        for file in sorted(folder.iterdir())[:2]:
            shutil.copy(file, few)
    _, _, err = tune(run, "few", "--set", "batch_size=2", "--out", "tuned.pt")
    assert "10 of 20 images were held back; --split" in err


def test_resume_that_finds_nothing_says_so_and_other_runs_are_left_alone(run, data):  # noqa: F811
    code, _, err = tune(run, data, "--resume")
    assert code == 0
    assert "runs/tuned holds no checkpoint: the run begins at the first step" in err
    before = Path("runs/tuned/recipe.json").stat().st_mtime_ns
    error = failure(tune(run, data, "--resume", "--compare"))
    assert "runs/tuned holds other runs (runs/tuned); --resume goes on with the --compare, --seeds and seed" in error
    assert Path("runs/tuned/recipe.json").stat().st_mtime_ns == before
    code, _, err = tune(run, data, "--resume")
    assert code == 0
    assert "holds no checkpoint" not in err


def test_a_folder_with_a_run_is_not_written_over(run, data):  # noqa: F811
    assert tune(run, data)[0] == 0
    assert "runs/tuned holds a run already; --resume goes on with it, --run FOLDER" in failure(tune(run, data))
    assert "recipe.lr was 0.01 and is 0.5" in failure(tune(run, data, "--resume", "--set", "lr=0.5"))
    assert json.loads(Path("runs/tuned/recipe.json").read_text())["lr"] == 0.01
    other = [
        "finetune",
        "tuned.pt",
        "--trust-source",
        "--data",
        data,
        *QUICK[:-4],
        "--epochs",
        "1",
        "--run",
        "runs/tuned",
    ]
    assert "network was" in failure(run(*other, "--resume"))
    assert tune(run, data, "--run", "elsewhere")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "shrot"], "there is no recipe 'shrot'"),
        (["--set", "lr=x", "--set", "what=1"], "lr is 'x'; expected a number; unknown key 'what'"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--out", "tuned.bin"], "expected one of .pt, .pth, .safetensors"),
        (["--set", "batch_size=1000"], "there are 120 training images"),
        (
            ["--set", "smoothing=1", "--set", "auto_augment=nonsense"],
            "auto_augment is 'nonsense'; expected what",
        ),
        (["--set", "seed=99999999999"], "seed is 99999999999; expected a number of at most 2,147,483,647"),
        (
            ["--set", "batch_size=1", "--set", "mixup=0.2"],
            "batch_size is 1; expected an even number with mixup or cutmix",
        ),
        (["--input-size", "-4"], "the input size is -4; it must be at least 1"),
        (["--device", "meta"], "device is 'meta', which cannot be used here"),
        (["--device", "tpu"], "device is 'tpu', which cannot be used here"),
        (["--recipe", "distill", "--set", "distill=2"], "distill is 2.0; expected a number from 0 to 1"),
    ],
)
def test_bad_options_get_one_line(run, data, args, message):  # noqa: F811
    assert message in failure(tune(run, data, *args))
    assert not Path("tuned.pt").exists()


def test_bad_images_are_named_and_counted(run, tmp_path):  # noqa: F811
    data = write_digits(tmp_path / "digits", 160)
    bad = next((data / "train" / "3").iterdir())
    bad.write_bytes(bad.read_bytes()[:40])
    error = failure(tune(run, data))
    assert f"1 image cannot be read, at most 0 are skipped: {bad}" in error
    code, _, err = tune(run, data, "--max-bad", "1", "--run", "again")
    assert code == 0, err
    assert "1 image could not be read, and again/unreadable.txt names them" in err
    assert Path("again/unreadable.txt").read_text() == f"{bad}\n"
    code, _, err = tune(run, data, "--max-bad", "1", "--run", "again", "--resume")
    assert code == 0, err
    assert Path("again/unreadable.txt").read_text() == f"{bad}\n"


def test_a_network_that_overflowed_in_the_last_step_is_not_kept(run, data):  # noqa: F811
    error = failure(tune(run, data, "--set", "lr=1e30", "--set", "clip=0", "--set", "batch_size=120"))
    assert "the validation's loss is no finite number after step 1 of 1" in error
    assert not list(Path("runs/tuned").glob("*.pt"))


def test_classes_of_other_names_are_refused_and_get_another_classifier(run, data, tmp_path):  # noqa: F811
    assert tune(run, data, "--out", "tuned.pt")[0] == 0
    shutil.copytree(data, other := tmp_path / "other")
    for part in ("train", "val"):
        (other / part / "0").rename(other / part / "ten")
    error = failure(run("evaluate", "tuned.pt", "--trust-source", "--data", other))
    assert "has the class 1 where the network has 0: labels would mean others" in error
    code, _, err = run("finetune", "tuned.pt", "--trust-source", "--data", other, *QUICK[:-4], "--run", "again")
    assert code == 0, err
    assert "the classifier was replaced" in err


def test_an_artifact_with_other_classes_is_refused_for_evaluation(run, data, artifact, tmp_path):  # noqa: F811
    assert "give load(..., base=) the original network" in failure(run("evaluate", artifact, "--data", data))
    error = failure(run("evaluate", "resnet10t", "--no-pretrained", "--data", data, "--input-size", "32"))
    assert "has 10 classes and the network 1000: labels would mean others" in error


def test_scores_of_a_network_that_gives_no_numbers_say_so(run, data):  # noqa: F811
    model = DigitNet()
    torch.save({k: v * torch.nan if v.is_floating_point() else v for k, v in model.state_dict().items()}, "weights.pt")
    assert "the loss is no finite number" in run("evaluate", NET, "--weights", "weights.pt", "--data", data)[2]
    code, out, _ = run("evaluate", NET, "--weights", "weights.pt", *common(data))
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail)["loss"] is None


def start(*args, folder, processes=1, has_group=False):
    """Start the command in a process of its own, or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "se_inject", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=has_group,
    )  # fmt: skip


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def test_a_folder_in_which_another_process_trains_is_left_alone(data, tmp_path):
    folder = tmp_path / "runs" / "model"
    args = ["finetune", NET, "--data", data, *LAUNCHED, "--epochs", "1", "--run", folder]
    with hold_folder(folder):
        code, out = finish(start(*args, folder=tmp_path))
    assert code == 1
    assert f"another process is training in {folder}; wait for it, or begin elsewhere with --run FOLDER" in out
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert finish(start(*args, folder=tmp_path))[0] == 0


def test_two_processes_end_as_one_does(data, tmp_path):
    """With frozen batch norms, whose statistics are those of each process's own images otherwise."""
    args = ["finetune", NET, "--data", data, *LAUNCHED, "--epochs", "2", "--set", "batch_norm=frozen"]
    codes = {}
    for name, processes in (("one", 1), ("two", 2)):
        codes[name] = finish(start(*args, "--out", f"{name}.pt", folder=tmp_path, processes=processes))
    assert codes["one"][0] == codes["two"][0] == 0, codes
    assert [out.count(", weights: ") for _, out in codes.values()] == [1, 1]  # one process talks
    one, two = (load(tmp_path / f"{name}.pt", base=DigitNet) for name in ("one", "two"))
    for key, value in one.state_dict().items():
        # The gradients of two halves are added up in another order than those of a whole.
        torch.testing.assert_close(two.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)
    results = [json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in ("one", "two")]
    assert len(results[0]["hits"]) == len(results[1]["hits"]) == 40
    assert abs(results[0]["top1"] - results[1]["top1"]) <= 2.5
    lines = [read_metrics(tmp_path / "runs" / name / METRICS) for name in ("one", "two")]
    assert [line["step"] for line in lines[1] if "top1" in line] == [0, 7, 14]
    losses = [[line["loss"] for line in of_run if "loss" in line] for of_run in lines]  # of all images of a step
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(losses[0]) >= 1


def test_errors_of_many_processes_say_whose_they_are(data, tmp_path):
    code, out = finish(start("finetune", NET, "--data", data, "--seeds", "0", folder=tmp_path, processes=2))
    assert code != 0
    message = "--seeds is 0; it must be at least 1"
    assert {f"error: {message}", f"error in process 1: {message}"} <= set(out.splitlines())


def test_a_process_that_dies_stops_the_run_which_then_goes_on(data, tmp_path):
    args = ["finetune", NET, "--data", data, *LAUNCHED, "--epochs", "40"]
    process = start(*args, folder=tmp_path, processes=2)
    wait_for_checkpoint(tmp_path)
    worker = find_worker(process.pid)
    os.kill(worker, signal.SIGKILL)
    code, out = finish(process)
    assert code != 0
    assert "SIGKILL" in out or "-9" in out
    step = last_step(tmp_path)
    code, out = finish(start(*args, "--resume", folder=tmp_path, processes=2))
    assert code == 0, out
    assert last_step(tmp_path) == 280 > step


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(data, tmp_path, number):
    args = ["finetune", NET, "--data", data, *LAUNCHED, "--epochs", "12"]
    assert finish(start(*args, "--out", "whole.pt", folder=tmp_path))[0] == 0
    process = start(*args, "--out", "tuned.pt", folder=tmp_path)
    wait_for_checkpoint(tmp_path, "tuned")
    os.kill(process.pid, number)
    code, out = finish(process)
    assert code != 0
    if number != signal.SIGKILL:
        assert "--resume goes on" in out
        assert "Traceback" not in out
    code, out = finish(start(*args, "--out", "tuned.pt", "--resume", folder=tmp_path))
    assert code == 0, out
    states = [load(tmp_path / f"{name}.pt", base=DigitNet).state_dict() for name in ("whole", "tuned")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_a_terminal_sends_to_all_processes_stops_the_one_that_trains(data, tmp_path, number):
    args = ["finetune", NET, "--data", data, *LAUNCHED, "--set", "workers=2", "--epochs", "2000"]
    process = start(*args, folder=tmp_path, has_group=True)
    wait_for_checkpoint(tmp_path)
    os.killpg(process.pid, number)
    code, out = finish(process)
    assert code != 0
    assert "--resume goes on" in out
    assert "Traceback" not in out


def test_the_scores_of_two_processes_are_those_of_the_network_that_they_write(data, tmp_path):
    args = ["--data", data, *LAUNCHED, "--epochs", "2", "--set", "batch_norm=train"]
    code, out = finish(start("finetune", NET, *args, "--out", "tuned.pt", folder=tmp_path, processes=2))
    assert code == 0, out
    found = json.loads((tmp_path / "runs" / "tuned" / "result.json").read_text())
    code, out = finish(start("evaluate", "tuned.pt", "--trust-source", "--data", data, "--json", folder=tmp_path))
    assert code == 0, out
    assert found["top1"] == json.loads(out[out.index("{") :])["top1"]


def wait_for_checkpoint(folder, name="tuned"):
    path = folder / "runs" / name / "checkpoint.pt"
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError("no checkpoint")


def find_worker(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[-1])


def last_step(folder):
    return max(line["step"] for line in read_metrics(folder / "runs" / "tuned" / METRICS) if "top1" in line)
