"""The same command writes the same bytes, whatever Python's hashes, the working directory and the file's name are.

And no file names a folder of this machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from se_inject.programs import _shorten
from tests import nets
from tests.images_on_disk import make_two_folders

ROOT = Path(__file__).parent.parent
# Runs commands in one process; what each prints goes into a file of its own.
RUNNER = """
import io, sys, warnings
from contextlib import redirect_stdout
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from se_inject.cli import main
for i, line in enumerate(sys.stdin.read().splitlines()):
    sys.argv = ["se-inject", *line.split("\\t")]
    with redirect_stdout(io.StringIO()) as printed:
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, line
    with open(f"{i}.out", "w") as file:
        file.write(printed.getvalue())
"""


def run(commands, folder, seed):
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=commands,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


COMMANDS = """
inject tests.nets:TwoBranches --trust-source --out NAME.pt
inject tests.nets:TwoBranches --trust-source --weights WEIGHTS --out NAME.safetensors
export NAME.pt --trust-source --input-size 16 --out NAME.pt2
export NAME.pt --trust-source --input-size 16 --out NAME.onnx
export NAME.pt --trust-source --optimize --out NAME_fast.pt
export NAME.pt --trust-source --to adapter --out NAME_adapter.safetensors
plan resnet18 --json --graph NAME.svg
eject NAME.pt --trust-source --fold --data DATA --input-size 16 --out NAME_plain.pt
finetune NAME.pt --trust-source --data DATA --input-size 16 --epochs 1 --out NAME_tuned.pt SET
simplify NAME_tuned.pt --trust-source --data DATA --max-drop 100 --workers 0 --input-size 16 --out NAME_small.pt
report NAME_tuned.pt --trust-source --data DATA --workers 0 --input-size 16 --json --out NAME.html
search tests.nets:TwoBranches --trust-source --data DATA --budget 5% --steps 2 --input-size 16 --out NAME.json SET
"""


def list_commands(name, weights, data):
    """List commands that write files called after `name`, in the working directory."""
    words = {"NAME": name, "WEIGHTS": weights, "DATA": data, "SET": "--set\tbatch_size=4\t--set\tworkers=0"}
    text = COMMANDS.strip().replace(" ", "\t")
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


def drop_times(value):
    if isinstance(value, dict):
        timed = {"time", "times", "timings", "speed", "p50", "p95", "ratio", "seconds", "images_per_second"}
        return {key: drop_times(item) for key, item in value.items() if key not in timed}
    return [drop_times(item) for item in value] if isinstance(value, list) else value


def read_printed(path, name):
    """Read what a command printed, without the file's name and what was timed."""
    return drop_times(json.loads(path.read_text().replace(name, "NAME")))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders in which the same commands were run, each with the name of its files."""
    folder = tmp_path_factory.mktemp("determinism")
    torch.save(nets.TwoBranches().state_dict(), folder / "given.pth")
    make_two_folders(folder / "images", classes=[f"class{i}" for i in range(10)], num=2, num_val=1)
    found = {"0": (folder / "one", "first"), "random": (folder / "the other place" / "deep", "another_name")}
    for seed, (place, name) in found.items():
        run(list_commands(name, folder / "given.pth", folder / "images"), place, seed)
    return list(found.values())


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes(places):
    (one, name), (other, another) = places
    written = sorted(one.glob(f"{name}*"))
    assert {".pt", ".safetensors", ".pt2", ".onnx", ".svg", ".json", ".html"} == {path.suffix for path in written}
    for path in written:
        if path.suffix != ".html":  # it holds times
            assert path.read_bytes() == (other / path.name.replace(name, another, 1)).read_bytes(), path.name
    for i, line in enumerate(COMMANDS.strip().splitlines()):
        if "--json" in line:
            assert read_printed(one / f"{i}.out", name) == read_printed(other / f"{i}.out", another), line


@pytest.mark.slow
def test_files_name_no_folder_of_this_machine(places):
    folders = {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()} - {"/"}
    for place, name in places:
        files = [path for path in place.glob(f"{name}*") if path.suffix != ".html"]  # it shows the command
        assert len(files) == 11
        for path in files:
            content = path.read_bytes()
            assert [folder for folder in folders if folder.encode() in content] == [], path.name
        for suffix in (".pt2", ".onnx"):
            assert b"se_inject/block.py" in (place / f"{name}{suffix}").read_bytes()


def test_a_file_is_named_as_python_finds_it(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/home/me", "/home/me/lib", "rest"])
    assert _shorten("/home/me/lib/package/module.py") == "package/module.py"
    assert _shorten("/home/me/net.py") == "net.py"
    assert _shorten("/elsewhere/cell.py") == "cell.py"
    assert _shorten("<se_inject.generated.SEBlock_0>") == "<se_inject.generated.SEBlock_0>"
    assert _shorten(str(Path("rest/net.py").absolute())) == "net.py"


PLANNER = """
import sys
import timm, torch, torchvision
from se_inject import make_plan
from tests import nets
makers = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(),
    "unet": nets.UNet,
    "dense": lambda: nets.wrap(nets.Dense()),
    "three": lambda: nets.wrap(nets.SumOfThree()),
    "shuffle": lambda: nets.wrap(nets.Shuffle(), 32),
    "branches": nets.TwoBranches,
}
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = makers[name]() if name in makers else timm.create_model(name)
    for options in ({}, {"at": ("residual", "concat", "fusion", "stage", "depthwise")}):
        print(name, make_plan(model.to_empty(device="cpu"), **options).to_json())
"""


@pytest.mark.slow
def test_a_plan_does_not_depend_on_hashes():
    names = "resnet18 mobilenetv2_050 ghostnet_050 shufflenet unet dense three shuffle branches".split()
    found = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PLANNER, *names],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(done.stdout.splitlines()) >= 2 * len(names)
        found.add(done.stdout)
    assert len(found) == 1
