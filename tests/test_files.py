import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from se_inject.errors import ArtifactError
from se_inject.files import check_target, read_state_dict, read_values, write_tensors, write_whole


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_tensors_and_values_come_back(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    tied = torch.randn(3, 4)
    tensors = {"a": tied, "b": tied, "c": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    write_tensors(path, tensors, {"format": "mine", "list": [1, {"deep": None}]})
    values = read_values(path)
    assert {k: values[k] for k in ("format", "list")} == {"format": "mine", "list": [1, {"deep": None}]}
    assert all(torch.equal(values["state_dict"][key], tensor) for key, tensor in tensors.items())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new one")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_usual_rights(tmp_path):
    write_whole(tmp_path / "x.pt", lambda file: file.write(b"x"))
    (tmp_path / "y").write_bytes(b"y")
    assert (tmp_path / "x.pt").stat().st_mode == (tmp_path / "y").stat().st_mode


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_code_in_a_file_is_not_executed(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(ArtifactError, match="holds more than tensors and plain values, and is not executed"):
        read_values(path)
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ArtifactError, match="is not executed|cannot be read"):
        read_values(path)


def test_a_whole_pickled_model_is_not_executed(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="is not executed"):
        read_values(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error(tmp_path, suffix, part):
    path = tmp_path / f"x{suffix}"
    write_tensors(path, {"a": torch.randn(100, 100)}, {"format": "mine"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ArtifactError, match=f"{path.name} cannot be read, it is cut short or no file of tensors"):
        read_values(path)


def test_other_files_are_errors(tmp_path):
    with pytest.raises(ArtifactError, match="there is no file"):
        read_values(tmp_path / "none.pt")
    with pytest.raises(ArtifactError, match=r"has the suffix '\.bin'; expected one of \.pt, \.pth, \.safetensors"):
        read_values(tmp_path / "none.bin")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_values(tmp_path / "zip.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(ArtifactError, match="holds a Tensor; expected a dict"):
        read_values(tmp_path / "tensor.pt")


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
    ],
)
def test_a_state_dict_is_found_where_people_put_it(tmp_path, nest):
    state = nn.Linear(3, 2).state_dict()
    torch.save(nest(state), tmp_path / "x.pth")
    found = read_state_dict(tmp_path / "x.pth")
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], state["weight"])


def test_what_holds_no_state_dict_is_an_error(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="holds no state dict"):
        read_state_dict(tmp_path / "x.pt")


def test_a_target_that_cannot_be_written_is_refused_early(tmp_path):
    with pytest.raises(ArtifactError, match="there is no folder"):
        check_target(tmp_path / "none" / "x.pt")
    with pytest.raises(ArtifactError, match=r"suffix '\.onnx'"):
        check_target(tmp_path / "x.onnx")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ArtifactError, match="it is a folder"):
        check_target(tmp_path / "folder.pt")


def test_a_target_that_could_not_be_replaced_is_refused_early(tmp_path, monkeypatch):
    check_target(tmp_path / f"{'x' * 237}.pt")
    write_whole(tmp_path / f"{'x' * 237}.pt", lambda file: file.write(b"new"))
    with pytest.raises(ArtifactError, match="its name may have 240 bytes"):
        check_target(tmp_path / f"{'x' * 238}.pt")
    path = tmp_path / "kept.pt"
    path.touch()
    monkeypatch.setattr(os, "access", lambda asked, _: asked != path)
    with pytest.raises(ArtifactError, match=r"kept\.pt cannot be written: it is read-only"):
        check_target(path)
