"""A folder holds one network, says what it is, and is refused where its files disagree."""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from se_inject import blocks, inject, load, optimize, save, save_folder
from se_inject.card import Card
from se_inject.errors import ArtifactError, ModelError, OptionError
from se_inject.provenance import Source
from se_inject.rewrite import get_plan
from se_inject.sources import open_network
from tests import nets
from tests.digits import DigitNet
from tests.images_on_disk import make_image
from tests.test_cli import failure, run  # noqa: F401

FILES = {"config.json", "model.safetensors", "README.md"}


def make(num_classes=3, **options):
    model = inject(timm.create_model("test_resnet", num_classes=num_classes), **options).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make()


@pytest.fixture
def folder(model, tmp_path):
    save_folder(model, tmp_path / "birds")
    return tmp_path / "birds"


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_is_loaded_as_it_was(folder, model, x):
    assert {path.name for path in folder.iterdir()} == FILES
    assert torch.equal(load(folder)(x), model(x))
    assert torch.equal(load(f"{folder}/")(x), model(x))
    assert [path.name for path in folder.parent.iterdir()] == ["birds"]


def test_the_weights_are_an_ordinary_artifact(folder, model, tmp_path, x):
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load(folder / "model.safetensors")(x), model(x))
    ours = (folder / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "model.safetensors").read_bytes()


def test_the_config_says_what_the_artifact_says_and_what_timm_would(tmp_path):
    network = open_network("test_resnet", pretrained=False, num_classes=5)
    save_folder(inject(network.model), tmp_path / "birds", source=network.source)
    config = json.loads((tmp_path / "birds" / "config.json").read_text())
    assert list(config)[:2] == ["format", "version"]
    assert config["format"] == "se-inject"
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 5)
    assert config["pretrained_cfg"]["input_size"] == list(network.model.pretrained_cfg["input_size"])
    assert config["pretrained_cfg"]["mean"] == list(network.model.pretrained_cfg["mean"])
    assert config["source"]["name"] == "test_resnet.r160_in1k"
    assert [site["owner"] for site in config["plan"]["sites"]] == [
        path.rpartition(".")[0] for path in blocks(load(tmp_path / "birds"))
    ]


def test_timm_does_not_load_the_weights_without_the_blocks(folder):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\.se\.fc1"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_an_optimized_network_and_one_of_ones_own_come_back(model, tmp_path, x):
    fast = optimize(model, x)
    save_folder(fast, tmp_path / "fast")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "fast")(x), fast(x))
    own = inject(nets.UNet())
    save_folder(own, tmp_path / "own")
    assert torch.equal(load(tmp_path / "own", base=nets.UNet)(x), own.eval()(x))
    card = (tmp_path / "own" / "README.md").read_text()
    assert 'se_inject.load("own", base=network)' in card
    assert "architecture" not in json.loads((tmp_path / "own" / "config.json").read_text())


def test_a_folder_of_ours_is_replaced_and_other_files_stay(folder, x):
    (folder / "notes.txt").write_text("mine")
    other = make(5)
    save_folder(other, folder)
    assert torch.equal(load(folder)(x), other(x))
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    (folder.parent / "empty").mkdir()
    save_folder(other, folder.parent / "empty")
    assert {path.name for path in (folder.parent / "empty").iterdir()} == FILES


def test_a_new_folder_has_the_usual_rights(folder):
    (folder.parent / "other").mkdir()
    assert folder.stat().st_mode == (folder.parent / "other").stat().st_mode


def test_what_is_not_ours_is_not_written_over(model, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ArtifactError, match="theirs holds something else; give a folder that is empty"):
        save_folder(model, theirs)
    assert [path.name for path in theirs.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file cannot be written: it is a file"):
        save_folder(model, tmp_path / "file")
    with pytest.raises(ArtifactError, match="there is no folder"):
        save_folder(model, tmp_path / "none" / "birds")


def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch):
    with pytest.raises(ModelError):
        save_folder(timm.create_model("test_resnet"), tmp_path / "birds")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError, match="birds cannot be written: No space left on device"):
        save_folder(model, tmp_path / "birds")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_a_mix_of_two_networks_is_refused(folder, tmp_path, name):
    save_folder(make(r=4), tmp_path / "other")
    (tmp_path / "other" / name).replace(folder / name)
    with pytest.raises(ArtifactError, match=r"holds the config.json of one network and the .* they differ in .*plan"):
        load(folder)


def test_what_is_beyond_the_artifact_in_the_config_is_not_read(folder, model, x):
    change_config(folder, architecture="resnet999", mine=[1, 2])
    assert torch.equal(load(folder)(x), model(x))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a":' * 900 + "1" + "}" * 900, "does not say 'se-inject' as its format"),
        ('{"format": 1e999}', "does not say 'se-inject'"),
        ('{"format": ["se-inject"]}', "does not say 'se-inject'"),
        ("9" * 5000, "cannot be read as JSON"),
        ("null", "holds a NoneType; expected an object"),
        ("", "cannot be read as JSON"),
        ('{"format": "se-inject"}', "they differ in version, digest, source, plan"),
        (
            '{"format": "se-inject", "version": 1, "source": 7, "plan": {}}',
            "they differ in version, digest, source, plan",
        ),
        ('{"format": "se-inject", "version": 1, "source": 7, "plan":' + "[" * 900 + "]" * 900 + "}", "they differ in"),
    ],
)
def test_a_config_of_anybodys_gets_one_line(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_config_that_is_too_large_is_not_read(folder):
    os.truncate(folder / "config.json", 2**40)
    with pytest.raises(ArtifactError, match=r"config.json has 1,099,511,627,776 bytes; expected at most"):
        load(folder)


def test_a_folder_without_its_files_gets_one_line(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="there is no file .*birds/model.safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match="birds is no folder of se-inject: it has no config.json"):
        load(folder)


def test_a_license_is_a_short_name(model, tmp_path):
    with pytest.raises(OptionError, match="the license is 'MIT'; expected its short name on the hub"):
        save_folder(model, tmp_path / "birds", license="MIT")
    assert not list(tmp_path.iterdir())


def read_front(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_says_what_is_known_and_no_more(folder):
    front, card = read_front(folder), (folder / "README.md").read_text()
    assert front["license"] == "unknown"
    assert front["library_name"] == "se-inject"
    assert "base_model" not in front
    assert "## Accuracy\n\nNot measured.\n" in card
    assert "How it was trained is not recorded here." in card
    assert "random" not in card
    assert "Unknown: its publisher did not say" in card
    assert "arXiv:1709.01507" in card
    assert 'se_inject.load("birds")' in card


def test_the_card_has_a_row_for_each_block(folder, model):
    rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(blocks(model))


def test_the_card_says_where_fetched_weights_are_from(tmp_path):
    network = timm.create_model("test_resnet")
    name = network.pretrained_cfg["hf_hub_id"]
    source = Source("timm", "test_resnet.r160_in1k", weights=name, preprocess={"input_size": [3, 64, 64]})
    save_folder(inject(network), tmp_path / "birds", source=source)
    front, card = read_front(tmp_path / "birds"), (tmp_path / "birds" / "README.md").read_text()
    assert (front["base_model"], front["license"]) == (name, network.pretrained_cfg["license"])
    assert front["pipeline_tag"] == "image-classification"
    assert "Its publisher did not say; of the weights that it was begun from, timm says `apache-2.0`." in card
    assert "The blocks have not been trained." in card
    save_folder(inject(network), tmp_path / "birds", source=source, license="cc-by-4.0")
    assert read_front(tmp_path / "birds")["license"] == "cc-by-4.0"
    other = Source("timm", "test_resnet.r160_in1k", weights="weights/of.mine.pth")
    save_folder(inject(network), tmp_path / "birds", source=other)
    assert read_front(tmp_path / "birds")["license"] == "unknown"
    assert "base_model" not in read_front(tmp_path / "birds")


def test_names_of_anybodys_cannot_break_the_card(tmp_path):
    classes = ["a|b", "`</code><script>alert(1)</script>", "x\n---\nlicense: mit"]
    source = Source("timm", "test_resnet.r160_in1k", classes=classes)
    save_folder(make(), tmp_path / "birds", source=source)
    card = (tmp_path / "birds" / "README.md").read_text()
    assert "Its 3 classes: `a|b`, `'</code><script>alert(1)</script>`, `x?---?license: mit`." in card
    assert read_front(tmp_path / "birds")["license"] == "unknown"


def test_the_command_of_the_card_runs(run, model, tmp_path):  # noqa: F811
    own = inject(DigitNet(), example=torch.zeros(2, 1, 8, 8))
    save_folder(own, tmp_path / "own", source=Source("factory", "tests.digits:DigitNet"))
    save_folder(model, tmp_path / "birds")
    make_image(0).save("cat.png")
    for name, end in (("own", " --trust-source"), ("birds", "")):
        command = re.search("`(se-inject predict .*)`", (tmp_path / name / "README.md").read_text())[1]
        assert command == f"se-inject predict {name} cat.png{end}"
        code, _, err = run(*shlex.split(command)[1:])
        assert code == 0, err


@pytest.mark.parametrize(("source", "load", "command"), [
    (Source("timm", "hf-hub:a/b"), 'load("birds", trust_source=True)', "predict birds cat.png --trust-source`"),
    (Source("timm", "resnet18"), 'load("birds")', "predict birds cat.png`"),
    (None, 'load("birds", base=network)', None),
])  # fmt: skip
def test_the_card_says_what_its_network_asks_for(model, source, load, command):
    card = str(Card("birds", "birds", get_plan(model), source, 10**6, is_fresh=False))
    assert f"se_inject.{load}\n" in card
    assert (command or "Nothing in the files is executed.\n\n") in card
    assert (command is None) == ("se-inject predict" not in card)


def test_a_bar_is_escaped_in_tables_alone(model):
    plan = get_plan(model)
    plan = replace(plan, model="b|c", sites=(replace(plan.sites[0], merge="x = a | b"),))
    card = str(Card("birds", "birds", plan, None, 10**6, is_fresh=False))
    assert "`b|c` with 1 blocks" in card
    assert r"residual: `x = a \| b` |" in card


def test_the_command_line_writes_and_takes_a_folder(run, model, tmp_path, x):  # noqa: F811
    save(model, "model.pt")
    code, out, _ = run("export", "model.pt", "--to", "folder", "--out", "birds", "--license", "mit")
    assert (code, out) == (0, "birds: the network and its model card, which says how to load it\n")
    assert read_front(Path("birds"))["license"] == "mit"
    assert torch.equal(load("birds")(x), model(x))
    for name in ("birds", "./birds", tmp_path / "birds"):
        code, out, _ = run("plan", name, "--json")
        assert (code, len(json.loads(out)["sites"])) == (0, len(blocks(model)))
    assert json.loads(run("export", "birds", "--to", "folder", "--json")[1]) == {"to": "folder", "out": "model"}
    assert "holds its own weights" in failure(run("plan", "birds", "--num-classes", "3"))
    (tmp_path / "test_resnet").mkdir()
    assert run("plan", "test_resnet")[0] == 0
    assert "is no folder of se-inject" in failure(run("plan", "./test_resnet"))
    assert "holds something else" in failure(run("export", "model.pt", "--to", "folder", "--out", tmp_path))


@pytest.mark.parametrize(("first", "second"), [("a.pt", "b.safetensors"), ("a.safetensors", "b.pth")])
def test_an_artifact_is_written_in_another_format_with_the_same_bits(run, model, x, first, second):  # noqa: F811
    save(model, first)
    code, out, _ = run("export", first, "--out", second)
    assert (code, out) == (0, f"{second}: the same network, {Path(second).stat().st_size:,} bytes\n")
    state, again = load(first).state_dict(), load(second).state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    assert json.loads(run("export", second, "--out", "third" + Path(first).suffix, "--json")[1])["format"] == "artifact"
    assert torch.equal(load("third" + Path(first).suffix)(x), model(x))
    assert "would hold the same network again" in failure(run("export", first, "--out", "copy" + Path(first).suffix))
    assert "--input-size goes with programs" in failure(run("export", first, "--out", second, "--input-size", "64"))
    for options in ((), ("--optimize",)):
        message = failure(run("export", first, "--out", second, "--dynamic-size", *options))
        assert "--dynamic-size goes with programs" in message
