"""What is pushed to the hub comes back bit for bit, and what goes wrong there is said in one line."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from se_inject import blocks, inject, load, push_to_hub
from se_inject.errors import ArtifactError, OptionError, SourceError
from se_inject.hub import fetch_folder, read_name
from tests.hub_stub import TOKEN, run_hub
from tests.test_cli import failure, run  # noqa: F401
from tests.test_sources import unreachable  # noqa: F401

NAME = "hf-hub:user/birds"
# The hub's client says this to its HTTP library where it sends a file without its newer storage.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, an empty cache, and the token of its user."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session, disable_progress_bars

    disable_progress_bars()
    with run_hub() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # storage that is no plain HTTP
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        yield hub
        close_session()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = inject(timm.create_model("test_resnet", num_classes=3)).eval()
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def test_what_is_pushed_comes_back(hub, model, x):
    address = push_to_hub(model, "user/birds", license="mit")
    files = hub.repositories["user/birds"].commits
    assert address.endswith(f"/user/birds/commit/{list(files)[-1]}")
    assert len(files) == 2  # the empty repository, and all three files at once
    assert set(list(files.values())[-1]) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert f'load("{NAME}")' in list(files.values())[-1]["README.md"].decode()
    assert torch.equal(load(NAME)(x), model(x))


def test_the_token_goes_to_the_hub_alone(hub, model):
    push_to_hub(model, "user/birds")
    load(NAME)
    assert hub.list_tokens("hub") == {TOKEN}
    assert hub.list_tokens("storage") == {""}
    assert {method for where, method, _, _ in hub.requests if where == "storage"} == {"PUT", "GET"}


def test_a_token_can_be_given(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", os.devnull)
    with pytest.raises(ArtifactError, match="hf-hub:user/birds could not be written: the token .* has no right to it"):
        push_to_hub(model, "user/birds")
    assert push_to_hub(model, "user/birds", token=TOKEN, private=True)
    assert hub.repositories["user/birds"].private
    with pytest.raises(SourceError, match="has no such repository, or it is private"):
        load(NAME)


def test_a_revision_stays_what_it_was(hub, model, x):
    first = push_to_hub(model, "user/birds").rpartition("/")[2]
    other = inject(timm.create_model("test_resnet", num_classes=5)).eval()
    push_to_hub(other, "user/birds")
    assert torch.equal(load(NAME)(x), other(x))
    assert torch.equal(load(f"{NAME}@{first}")(x), model(x))
    with pytest.raises(
        SourceError, match="hf-hub:user/birds@none could not be fetched: the repository has no such rev"
    ):
        load(f"{NAME}@none")


def test_both_files_are_of_one_commit(hub, model, x, monkeypatch):
    """Somebody pushes after the first file was read."""
    import huggingface_hub

    push_to_hub(model, "user/birds")
    other = inject(timm.create_model("test_resnet", num_classes=5)).eval()
    download = huggingface_hub.HfApi.hf_hub_download

    def interrupted(self, repository, file, **options):
        path = download(self, repository, file, **options)
        if file == "config.json":
            monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", download)
            push_to_hub(other, "user/birds")
        return path

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", interrupted)
    assert torch.equal(load(NAME)(x), model(x))


def test_the_cache_is_enough(hub, model, x, monkeypatch):
    push_to_hub(model, "user/birds")
    load(NAME)
    num = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(load(NAME)(x), model(x))
    assert len(hub.requests) == num
    with pytest.raises(
        SourceError, match="hf-hub:user/cars could not be fetched: .* cannot be reached, and it is not in"
    ):
        load("hf-hub:user/cars")
    with pytest.raises(ArtifactError, match="hf-hub:user/birds could not be written: .* cannot be reached"):
        push_to_hub(model, NAME)


@pytest.mark.usefixtures("unreachable")
def test_without_a_network_there_is_one_line(run, model):  # noqa: F811
    line = failure(run("plan", NAME))
    assert line.endswith("fetched: https://huggingface.co cannot be reached, and it is not in the cache")
    with pytest.raises(
        ArtifactError, match="could not be written: https://huggingface.co cannot be reached, or HF_HUB"
    ):
        push_to_hub(model, NAME)


def test_a_hub_that_does_not_answer_gets_one_line(hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="hf-hub:user/birds could not be written: .*[Cc]onnect"):
        push_to_hub(model, NAME)


def test_what_the_hub_refuses_gets_one_line(hub, model):
    with pytest.raises(
        SourceError, match="hf-hub:user/birds could not be fetched: .* has no such repository, or it is"
    ):
        load(NAME)
    hub.refuses = True
    with pytest.raises(ArtifactError, match="could not be written: the token .* has no right to it, says http"):
        push_to_hub(model, NAME)


@pytest.mark.parametrize(
    "name", ["birds", "hf-hub:birds", "user/birds/wings", "user/", "user/birds@", "user/birds@a@b"]
)
def test_what_is_no_name_is_said_before_anything_is_sent(hub, model, name):
    with pytest.raises(SourceError, match=r"is no name on the hub; expected hf-hub:USER/NAME or hf-hub:USER/NAME@REV"):
        push_to_hub(model, name)
    assert not hub.requests


def test_a_name_may_have_a_revision():
    assert read_name("hf-hub:user/birds@v1") == ("user/birds", "v1")
    assert read_name("user/birds") == ("user/birds", None)


def test_a_name_that_the_client_refuses_gets_one_line(hub):
    with pytest.raises(SourceError, match="hf-hub:us er/birds could not be fetched: Repo id must"):
        load("hf-hub:us er/birds")


def test_a_license_is_a_short_name(hub, model):
    with pytest.raises(OptionError, match="the license is 'My own'; expected its short name on the hub, as in mit"):
        push_to_hub(model, NAME, license="My own")
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no network of se-inject"),
        ({"config__json": b'{"architecture": "resnet18"}'}, "holds no network of se-inject"),
        ({"config__json": b"{}", "model__safetensors": b""}, "holds no network of se-inject"),
        ({"config__json": b"[" * 100_000}, "config.json cannot be read as JSON"),
        ({"config__json": b"[1]"}, "config.json holds a list; expected an object"),
        ({"config__json": b"\xff"}, "config.json cannot be read as JSON"),
        ({"config__json": b'{"format": "se-inject"}'}, "has a config.json of se-inject's and no model.safetensors"),
        ({"config__json": b'{"format": "se-inject"}', "model__safetensors": b"x"}, "cannot be read, it is cut short"),
    ],
)
def test_what_is_not_ours_gets_one_line(hub, files, message):
    hub.add("user/birds", **files)
    with pytest.raises((ArtifactError, SourceError), match=message):
        load(NAME)


def test_somebody_elses_network_is_not_written_over(hub, model):
    hub.add("user/birds", config__json=b'{"architecture": "resnet18"}', model__safetensors=b"theirs")
    with pytest.raises(ArtifactError, match="hf-hub:user/birds holds another network already"):
        push_to_hub(model, NAME)
    hub.add("user/cars", model__safetensors=b"theirs")
    with pytest.raises(ArtifactError, match="hf-hub:user/cars holds another network already"):
        push_to_hub(model, "user/cars")
    hub.add("user/own", README__md=b"to be filled")
    assert push_to_hub(model, "user/own")
    assert all(len(repository.commits) == 1 for name, repository in hub.repositories.items() if name != "user/own")


def test_a_factory_is_not_called_because_a_repository_says_so(hub, tmp_path, monkeypatch):
    from se_inject.provenance import Source
    from tests import nets

    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    push_to_hub(inject(nets.TwoBranches(), r=4), NAME, source=Source("factory", "trap:build"))
    with pytest.raises(SourceError, match="the network is built by trap:build, which is code"):
        load(NAME)
    assert blocks(load(NAME, base=nets.TwoBranches))


def test_a_network_of_timms_on_the_hub_is_opened_by_timm(hub, run, tmp_path):  # noqa: F811
    theirs = timm.create_model("test_resnet", num_classes=4)
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    files = {file.name.replace(".", "__"): file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    hub.add("user/birds", **files)
    assert fetch_folder(NAME) is None
    code, out, err = run(NAME, "--out", "model.pt")
    assert (code, out.split(" with")[0]) == (0, "model.pt: ResNet")
    assert f"weights: {NAME}" in err
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load("model.pt")(x), theirs.eval()(x))


def test_the_command_line_pushes_and_takes_a_repository_for_a_model(hub, run, model, x):  # noqa: F811
    from se_inject import save

    save(model, "model.pt")
    code, out, _ = run("export", "model.pt", "--to", NAME, "--private", "--license", "cc-by-4.0")
    assert (code, out) == (0, f"{NAME}: the network and its model card, which says how to load it\n")
    assert hub.repositories["user/birds"].private
    code, out, _ = run("plan", NAME, "--json")
    assert (code, len(json.loads(out)["sites"])) == (0, len(blocks(model)))
    assert run("export", NAME, "--out", "again.pt")[0] == 0
    assert torch.equal(load("again.pt")(x), model(x))
    values = json.loads(run("export", "model.pt", "--to", NAME, "--json")[1])
    assert values["commit"].rpartition("/")[2] == list(hub.repositories["user/birds"].commits)[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "hf-hub:user/none"], "hf-hub:user/none could not be fetched: http"),
        (["plan", "hf-hub:none"], "hf-hub:none is no name on the hub; expected hf-hub:USER/NAME"),
        (["plan", NAME, "--num-classes", "3"], "holds its own weights"),
        (["export", NAME, "--to", "hf-hub:user"], "hf-hub:user is no name on the hub"),
        (["export", NAME, "--to", "hf-hub:user/x", "--out", "x"], "writes no file, and --out has no part in it"),
        (["export", NAME, "--to", "hf-hub:user/x", "--optimize"], "--to writes the network as it is, and --optimize"),
        (["export", NAME, "--license", "mit"], "--license, --run and --private go with --to folder"),
        (["export", NAME, "--to", "folder", "--private"], "--private goes with --to hf-hub:USER/NAME"),
    ],
)
def test_bad_names_and_options_get_one_line(hub, run, model, args, message):  # noqa: F811
    push_to_hub(model, NAME)
    assert message in failure(run(*args))


@pytest.mark.slow
def test_the_environment_says_which_hub(hub, model, tmp_path):
    from huggingface_hub import constants

    push_to_hub(model, NAME)
    environment = {
        **os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "se_inject", "export", NAME, "--out", str(tmp_path / "copy.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "hub" / "models--user--birds").is_dir()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "copy.pt")(x), model(x))
