"""A model card shows the figures of a run only if the run ended with just this network."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from se_inject import blocks, inject, load, save, save_folder
from se_inject.comparison import Result
from se_inject.errors import ArtifactError
from se_inject.measured import read_run
from se_inject.recipe_files import read_recipe
from tests import nets
from tests.digits import write_digits
from tests.test_cli import run  # noqa: F401

QUICK = "--set batch_size=16 --set crop=none --set hflip=0 --set workers=0 --r 4 --input-size 8".split()


@pytest.fixture
def model():
    return inject(nets.TwoBranches(), r=4).eval()


def write_run(folder, model, *, arm="se", seed=0, recipe=None, settings=None, **figures):
    """Write what a fine-tune leaves behind, with figures of our own."""
    folder.mkdir(parents=True, exist_ok=True)
    history = [
        {"step": step, "epoch": step / 2, "top1": top1, "top5": 99.5, "val_loss": 1.0}
        for step, top1 in ((0, 50.0), (2, 75.0), (4, 62.5))
    ]
    values = {
        "before": 50.0,
        "top1": 62.5,
        "parameters": 1,
        "seconds": 1.0,
        "images_per_second": 1.0,
        "hits": "1101102",
    }
    result = Result(arm=arm, seed=seed, history=history, **{**values, **figures})
    (folder / "result.json").write_text(json.dumps(asdict(result)))
    (folder / "recipe.json").write_text(json.dumps((recipe or read_recipe("se_only")).to_values()))
    if model is not None:
        save(model, folder / "last.pt")
    if settings is not None:
        torch.save({"settings": settings}, folder / "checkpoint.pt")


def test_the_figures_are_those_of_the_last_network(model, tmp_path):
    write_run(tmp_path / "run", model)
    measured = read_run(tmp_path / "run", model.state_dict())
    assert (measured.scores["top1"], measured.before, measured.num_images) == (62.5, 50.0, 6)
    assert (measured.recipe_name, measured.verdict, measured.has_labels) == ("se_only", "", True)
    save_folder(model, tmp_path / "birds", run=tmp_path / "run")
    card = (tmp_path / "birds" / "README.md").read_text()
    assert "| on 6 validation images | top-1 | top-5 |" in card
    assert "| before the fine-tune | 50.00 % | |" in card
    assert "| this network, after epoch 2 | 62.50 % | 99.50 % |" in card
    assert "recipe `se_only`:\n\n```yaml\nepochs: " in card


def test_the_best_network_has_its_own_figures(model, tmp_path):
    write_run(tmp_path / "run", inject(nets.TwoBranches(), r=4))
    save(model, tmp_path / "run" / "best.pt")
    scores = read_run(tmp_path / "run", model.state_dict()).scores
    assert (scores["step"], scores["top1"]) == (2, 75.0)


def test_the_figures_of_another_network_are_refused(model, tmp_path):
    write_run(tmp_path / "run", model)
    with torch.no_grad():
        next(iter(blocks(model).values())).fc2.bias += 1e-3
    with pytest.raises(ArtifactError, match="run is the run of another network: it ended with other weights"):
        save_folder(model, tmp_path / "birds", run=tmp_path / "run")
    assert not (tmp_path / "birds").exists()
    with pytest.raises(ArtifactError, match="is the run of another network"):
        read_run(tmp_path / "run", nets.TwoBranches().state_dict())


def test_a_control_gives_a_verdict_and_no_figures_of_its_own(model, tmp_path):
    plain = nets.TwoBranches()
    write_run(tmp_path / "run" / "se-0", model, hits="1" * 40)
    write_run(tmp_path / "run" / "control-0", None, arm="control", top1=10.0, hits="01" * 20)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "run" / "control-0" / "last.pt")
    (tmp_path / "run" / "se-0" / "recipe.json").rename(tmp_path / "run" / "recipe.json")
    assert read_run(tmp_path / "run", model.state_dict()).verdict.startswith("SE helped: +52.50 points")
    with pytest.raises(ArtifactError, match="is the run of another network"):
        read_run(tmp_path / "run", plain.state_dict())


def test_agreement_is_not_called_accuracy(model, tmp_path):
    recipe = read_recipe("distill")
    assert recipe.distill == 1
    write_run(tmp_path / "run", model, recipe=recipe, settings={"data": {"num_classes": 0}})
    save_folder(model, tmp_path / "birds", run=tmp_path / "run")
    assert "| agreement with the original network's classes, " in (tmp_path / "birds" / "README.md").read_text()
    write_run(tmp_path / "run", model, recipe=recipe, settings={"data": {"num_classes": 7}})
    assert read_run(tmp_path / "run", model.state_dict()).has_labels
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(ArtifactError, match="there is no file .*checkpoint.pt"):
        read_run(tmp_path / "run", model.state_dict())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "{}", "cannot be read as the folder of a fine-tune: 'arm'"),
        ("result.json", "[", "cannot be read as the folder of a fine-tune"),
        ("result.json", '{"history": []}', "cannot be read as the folder of a fine-tune"),
        ("recipe.json", '{"epoch": 3}', "unknown key 'epoch', did you mean epochs"),
        ("recipe.json", "[]", "cannot be read as the folder of a fine-tune"),
    ],
)
def test_what_is_no_run_gets_one_line(model, tmp_path, name, content, message):
    write_run(tmp_path / "run", model)
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_run(tmp_path / "run", model.state_dict())
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is no folder of a finished fine-tune: it has no result.json"):
        read_run(tmp_path / "run", model.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Cosine annealing scheduler:UserWarning")
def test_the_command_line_shows_what_a_fine_tune_measured(run, tmp_path):  # noqa: F811
    data = write_digits(tmp_path / "data", 160)
    code, _, err = run("finetune", "tests.digits:DigitNet", "--data", data, *QUICK, "--epochs", "1", "--compare")
    assert code == 0, err
    arguments = ("export", "tuned.pt", "--trust-source", "--to", "folder", "--out", "digits", "--run", "runs/tuned")
    code, _, err = run(*arguments)
    assert code == 0, err
    result = json.loads(Path("runs/tuned/se-0/result.json").read_text())
    card = Path("digits/README.md").read_text()
    assert f"| this network, after epoch 1 | {result['top1']:.2f} % |" in card
    assert f"| before the fine-tune | {result['before']:.2f} % |" in card
    assert "on 40 validation images" in card
    assert "for as many steps on the same images: SE " in card
    assert 'se_inject.load("digits", base=DigitNet)' in card
    from tests.digits import DigitNet

    assert load("digits", base=DigitNet)
