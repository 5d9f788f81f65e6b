"""Every command and every example in the README is run, and the code that it shows is the code."""

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from se_inject import blocks, inject
from tests.images_on_disk import make_two_folders

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line[2:] for kind, text in FENCES if kind == "console" for line in text.splitlines()]
EXAMPLES = [text for kind, text in FENCES if kind == "python" and text.startswith("import")]
SHOWN = [text for kind, text in FENCES if kind == "python" and not text.startswith("import")]


def test_the_commands_were_found():
    assert len(COMMANDS) == 29
    assert len(EXAMPLES) == 2
    assert len(SHOWN) == 2


@pytest.mark.slow
def test_every_se_inject_command_runs_in_the_order_of_the_readme(tmp_path):
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "cat.png")
    make_two_folders(tmp_path / "DIR", num=4)
    # An untrained network of timm's has branches that are zero, and gates that learn nothing.
    torch.save(timm.create_model("resnet18", zero_init_last=False).state_dict(), tmp_path / "resnet18.pt")
    quick = {
        "finetune": "--set batch_size=4 --set workers=0 --epochs 1 --input-size 64".split(),
        "evaluate": "--workers 0 --input-size 64".split(),
        "report": "--workers 0 --input-size 64".split(),
        "simplify": "--workers 0 --input-size 64".split(),
        "eject": "--input-size 64".split(),
        "search": "--set batch_size=4 --set workers=0 --steps 2 --input-size 64".split(),
    }
    program = Path(sys.executable).parent / "se-inject"
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] != "se-inject":
            continue
        # Those that download; tests may run where no hub can be reached.
        fetches = words[1] != "plan" and {"resnet50", "mobilenetv2_100"} & {*words[1:3]}
        fetches = fetches and "--no-pretrained" not in words
        if "resnet18" in words and words[1] != "plan":
            words = [w for w in words if w != "--no-pretrained"] + ["--weights", "resnet18.pt"]
        arguments = [*words[1:], *quick.get(words[1], []), *(["--no-pretrained"] if fetches else [])]
        done = subprocess.run(
            [program, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout


def test_make_has_the_two_commands_and_ci_runs_them():
    makefile = (ROOT / "Makefile").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert shutil.which("make")
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert f"\n{target}: " in makefile
        assert f"\nmake {target}\n" in script


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=["timm", "own"])
def test_every_example_runs(example, tmp_path):
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "blocks(model)" in example:
        assert "SqueezeExcite(256, 16)" in done.stdout


def without_blank_lines(text):
    return "\n".join(line for line in textwrap.dedent(text).splitlines() if line.strip())


def test_the_code_that_is_shown_is_the_code():
    from torchvision.models.resnet import BasicBlock

    before, after = SHOWN
    assert without_blank_lines(before) == without_blank_lines(inspect.getsource(BasicBlock.forward))
    assert after == inspect.getsource(type(inject(torchvision.models.resnet18()).layer1[0]))


def test_docstring_examples_run():
    import doctest

    names = (
        "adapters block budget comparison ejection export gate_folding groups planner recipe_files restriction rewrite"
    )
    for name in [*names.split(), "standard"]:
        module = importlib.import_module(f"se_inject.{name}")
        known = {"torch": torch, "inject": inject, "blocks": blocks}
        results = doctest.testmod(module, extraglobs=known)
        assert results.attempted > 0
        assert results.failed == 0, module.__name__
