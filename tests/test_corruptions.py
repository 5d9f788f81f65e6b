"""The images that differ from each other, on which SE is measured."""

import sys

import pytest
import torch
from PIL import Image

from benchmarks import corruptions


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_an_image_is_changed_more_the_stronger_a_corruption_is(kind, size):
    x = 0.3 + 0.4 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    changes = []
    for strength in (0.1, 0.9):
        changed = corruptions.KINDS[kind](x, strength, torch.Generator().manual_seed(1))
        assert changed.shape == x.shape
        changes.append((changed - x).square().mean().item())
    assert changes == [0, 0] if kind == "none" else changes[1] > changes[0] > 0


def test_a_copy_is_the_same_each_time_and_its_images_differ(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (90, 120, 150)).save(folder / f"{i}.png")
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["corruptions", str(folder), str(tmp_path / name)])
        corruptions.main()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert f"{len(paths)} images in" in capsys.readouterr().out
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("first", "second")
    )
    assert first == second
    assert len(set(first.values())) > 10  # of the same image: what it gets depends on its path
    assert set(first) == {path.relative_to(folder).with_suffix(".png") for path in paths}


def test_of_a_share_the_others_are_left(tmp_path, monkeypatch):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for i in range(100):
        Image.new("RGB", (8, 8), (90, 120, 150)).save(folder / f"{i}.png")
    for name, share in (("all", "1"), ("some", "0.5"), ("none", "0")):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "train"), str(tmp_path / name), "--share", share])
        corruptions.main()
    left, same = 0, 0
    for path in folder.iterdir():
        whole, some, none = ((tmp_path / name / "cat" / path.name).read_bytes() for name in ("all", "some", "none"))
        assert none == path.read_bytes()
        assert some in (whole, none)
        left, same = left + (some == none), same + (whole == none)
    assert 30 < left - same < 60


def test_a_folder_without_images_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["corruptions", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        corruptions.main()
    assert "found no images in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
