import gc
import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import get_img_extensions
from torch.utils.data import Subset
from torchvision.datasets import FakeData

from se_inject.contents import count_images, get_name, list_classes, list_targets
from se_inject.datasets import Data, open_data
from se_inject.errors import DataError
from tests.images_on_disk import make_folder, make_image, make_shards, make_two_folders


def read_split(data, folder):
    data.write_split(folder)
    return json.loads((folder / "split.json").read_text())


# Folders


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("train", "validation"), ("training", "valid"), ("train", "test"), ("Train", "Test"),
     ("Training", "Testing")],
)  # fmt: skip
def test_a_folder_with_training_and_validation_images_is_read_as_it_is(tmp_path, train, val):
    make_folder(tmp_path / train, ["dog", "cat"], num=3)
    make_folder(tmp_path / val, ["dog", "cat"], num=2, seed=1)
    data = open_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.num_classes == 2
    assert data.is_labelled
    assert data.split is None
    assert list_targets(data.train) == [0, 0, 0, 1, 1, 1]
    assert list_targets(data.val) == [0, 0, 1, 1]
    assert get_name(data.val, 2) == str(tmp_path / val / "dog" / "0.png")


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tif", ".gif"])
def test_images_of_other_formats_are_seen(tmp_path, suffix):
    make_two_folders(tmp_path)
    before = get_img_extensions()
    for path in sorted(tmp_path.glob("train/*/*.png"))[::2]:
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    assert count_images(open_data(str(tmp_path)).train) == len(list(tmp_path.glob("train/*/*.*")))
    assert get_img_extensions() == before


def test_val_goes_before_test(tmp_path):
    make_two_folders(tmp_path)
    make_folder(tmp_path / "test", num=5)
    assert count_images(open_data(str(tmp_path)).val) == 4


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    make_two_folders(tmp_path, ["10", "9", "2"])
    assert open_data(str(tmp_path)).classes == ("2", "9", "10")


def test_classes_that_are_numbered_alike_have_one_order(tmp_path):
    names = ["a1", "a01", "A1", "Cat", "cat", "1", "01"]
    make_two_folders(tmp_path, names)
    code = "import sys; from se_inject.datasets import open_data; print(*open_data(sys.argv[1]).classes)"
    orders = {
        subprocess.check_output([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("0", "1", "2")
    }
    assert orders == {b"01 1 A1 a01 a1 Cat cat\n"}


def test_classes_of_a_named_set_that_differ_are_refused(tmp_path):
    make_folder(tmp_path / "train", ["bird", "cat", "dog"])
    make_folder(tmp_path / "validation", ["automobile", "bird", "cat"])
    match = "the split train and the split validation differ, only in the split train: dog; only in .*: automobile"
    with pytest.raises(DataError, match=match):
        open_data(f"torch/image_folder:{tmp_path}")


def test_a_single_folder_is_split_class_by_class(tmp_path):
    make_folder(tmp_path, ["a", "b", "c"], num=10)
    data = open_data(str(tmp_path))
    assert isinstance(data.train, Subset)
    assert sorted(list_targets(data.train)) == [0] * 8 + [1] * 8 + [2] * 8
    assert sorted(list_targets(data.val)) == [0, 0, 1, 1, 2, 2]
    train, val = data.split
    assert sorted([*train, *val]) == list(range(30))


def test_the_split_is_a_function_of_the_seed(tmp_path):
    make_folder(tmp_path, num=10)
    first, again, other = (open_data(str(tmp_path), seed=seed) for seed in (3, 3, 4))
    assert first.split == again.split
    assert first.split != other.split
    assert first.describe() == again.describe()
    assert first.describe()["digest"] != other.describe()["digest"]


@pytest.mark.parametrize("make", [make_folder, make_two_folders])
def test_images_are_the_same_wherever_they_lie(tmp_path, monkeypatch, make):
    make(tmp_path / "data")
    expected = open_data(str(tmp_path / "data")).describe()
    monkeypatch.chdir(tmp_path)
    for name in ("data", "data/", "./data"):
        assert open_data(name).describe()["digest"] == expected["digest"]
    Path("data").rename("moved")
    moved = open_data("moved").describe()
    assert (moved["digest"], moved["origin"]) == (expected["digest"], "moved")
    image = next(Path("moved").rglob("cat/*"))
    image.rename(image.with_stem("other"))
    assert open_data("moved").describe()["digest"] != expected["digest"]


def test_what_has_no_files_is_told_by_its_name():
    parts = [Subset(FakeData(4, num_classes=2), [0, 1, 2])] * 2
    one, other = (Data(*parts, ("a", "b"), 2, origin).describe()["digest"] for origin in ("torch/a", "torch/b"))
    assert one != other


def test_the_split_is_written_down(tmp_path):
    make_folder(tmp_path / "images", num=5)
    data = open_data(str(tmp_path / "images"))
    written = read_split(data, tmp_path)
    assert written["root"] == str(tmp_path / "images")
    assert written["val"] == [get_name(data.val, i) for i in range(2)]
    assert not set(written["train"]) & set(written["val"])
    assert len(written["train"]) == 8


def test_a_split_that_was_written_down_is_taken_again(tmp_path):
    make_folder(tmp_path / "images", num=5)
    first = open_data(str(tmp_path / "images"), seed=3)
    first.write_split(tmp_path)
    (tmp_path / "images").rename(tmp_path / "moved")
    options = {"split": tmp_path / "split.json"}
    again = open_data(str(tmp_path / "moved"), **options)
    judged = open_data(str(tmp_path / "moved"), is_evaluation=True, **options)
    assert again.split == judged.split == first.split
    assert list_targets(judged.val) == [0, 1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "split.json cannot be read: No such file or directory; expected the split.json of a run's folder"),
        ("{", "split.json is no split of a folder; expected the split.json of a run's folder: root, and the images"),
        ("[]", "split.json is no split of a folder"),
        ('{"root": "x", "train": [], "val": ["y/a/0.png"]}', "split.json is no split of a folder"),
        (
            '{"root": "x", "train": [], "val": ["x/c/0.png"]}',
            "names images that .*/images does not have, c/0.png first",
        ),
        ('{"root": "x", "train": ["x/cat/0.png"], "val": []}', "has no images in val, or some in train too"),
        ('{"root": "x", "train": ["x/cat/0.png"], "val": ["x/cat/0.png"]}', "has no images in val, or some in train"),
    ],
)
def test_what_is_no_split_of_these_images_is_refused(tmp_path, text, match):
    make_folder(tmp_path / "images")
    if text is not None:
        (tmp_path / "split.json").write_text(text)
    with pytest.raises(DataError, match=match):
        open_data(str(tmp_path / "images"), split=tmp_path / "split.json")


def test_a_split_is_of_a_single_folder(tmp_path):
    make_two_folders(tmp_path)
    for options in ({}, {"is_evaluation": True}):
        with pytest.raises(
            DataError, match=r"--split s.json tells the images of a single folder apart, and .* has val/"
        ):
            open_data(str(tmp_path), split=Path("s.json"), **options)
    with pytest.raises(DataError, match="a single folder apart, and torch/cifar10 is none"):
        open_data("torch/cifar10", split=Path("s.json"))


def test_two_folders_have_no_split_to_write_down(tmp_path):
    open_data(str(make_two_folders(tmp_path))).write_split(tmp_path)
    assert not (tmp_path / "split.json").exists()


def test_a_class_with_one_image_trains(tmp_path):
    make_folder(tmp_path, ["a"], num=5)
    make_folder(tmp_path, ["b"], num=1)
    data = open_data(str(tmp_path))
    assert list_targets(data.train).count(1) == 1
    assert list_targets(data.val) == [0]


def test_evaluation_takes_the_validation_images_alone(tmp_path):
    data = open_data(str(make_two_folders(tmp_path)), is_evaluation=True)
    assert data.train is None
    assert list_targets(data.val) == [0, 0, 1, 1]
    assert data.describe()["sizes"] == [4]


def test_the_folder_of_a_split_can_be_named(tmp_path):
    make_two_folders(tmp_path, num=4, num_val=2)
    make_folder(tmp_path / "test", num=3)
    make_folder(tmp_path / "fit", num=5)
    scored = open_data(str(tmp_path), is_evaluation=True, options={"val_split": "test"})
    assert (scored.origin, count_images(scored.val)) == (str(tmp_path / "test"), 6)
    assert count_images(open_data(str(tmp_path), is_evaluation=True, options={"val_split": "train"}).val) == 8
    trained = open_data(str(tmp_path), options={"train_split": "fit", "val_split": "test"})
    assert trained.describe()["sizes"] == [10, 6]


def test_folders_of_splits_may_have_any_names(tmp_path):
    make_folder(tmp_path / "fit", num=2)
    make_folder(tmp_path / "dev", num=3)
    data = open_data(str(tmp_path), options={"train_split": "fit", "val_split": "dev"})
    assert data.describe()["sizes"] == [4, 6]
    assert data.split is None
    with pytest.raises(DataError, match="has dev/ and no train/"):
        open_data(str(tmp_path), options={"val_split": "dev"})


def test_unlabelled_images_may_train_beside_a_named_folder(tmp_path):
    (make_folder(tmp_path / "all", num=4) / "cat").rename(tmp_path / "train")
    make_folder(tmp_path / "dev", num=3)
    data = open_data(str(tmp_path), may_be_unlabelled=True, options={"val_split": "dev"})
    assert data.describe()["sizes"] == [4, 6]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"val_split": "tset"}, r"--val-split is tset, and .*two has no such folder; it has test, train, val"),
        ({"val_split": "../single"}, r"--val-split is \.\./single, and .*two has no such folder"),
        ({"train_split": "Train"}, r"--train-split is Train, and .*two has no such folder"),
        ({"train_split": "val"}, r"two/val would train and validate; give another --train-split or --val-split"),
    ],
)
def test_a_folder_of_a_split_that_is_not_there_is_refused(tmp_path, options, match):
    make_folder(make_two_folders(tmp_path / "two") / "test")
    with pytest.raises(DataError, match=match):
        open_data(str(tmp_path / "two"), options=options)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("car", "plane", "train")])
@pytest.mark.parametrize("is_evaluation", [False, True])
def test_a_single_folder_has_no_split_to_name(tmp_path, classes, is_evaluation):
    make_folder(tmp_path, classes)
    for name in ("test", classes[0]):
        with pytest.raises(DataError, match=f"--val-split is {name}, and .* is a single folder, without folders of"):
            open_data(str(tmp_path), is_evaluation=is_evaluation, options={"val_split": name})


def test_evaluation_takes_a_single_folder_whole(tmp_path):
    data = open_data(str(make_folder(tmp_path, num=3)), is_evaluation=True)
    assert list_targets(data.val) == [0, 0, 0, 1, 1, 1]
    assert data.split is None


def test_evaluation_needs_no_training_images(tmp_path):
    make_folder(tmp_path / "val", num=3)
    assert count_images(open_data(str(tmp_path), is_evaluation=True).val) == 6


def test_hidden_folders_and_files_are_no_images(tmp_path):
    make_two_folders(tmp_path, num=2)
    make_folder(tmp_path / "train", [".cache"], num=1)
    make_folder(tmp_path / "train" / "cat", [".ipynb_checkpoints"], num=1)
    make_image(0).save(tmp_path / "train" / "cat" / "._0.png")
    data = open_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert list_targets(data.train) == [0, 0, 1, 1]


def test_a_link_to_a_folder_is_a_class(tmp_path):
    make_folder(tmp_path / "elsewhere", ["dogs"], num=2)
    make_folder(tmp_path / "images", ["cat"], num=2)
    (tmp_path / "images" / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    assert open_data(str(tmp_path / "images")).classes == ("cat", "dog")


def test_images_without_labels_may_train_where_that_is_allowed(tmp_path):
    make_folder(tmp_path, ["train"], num=5)
    make_folder(tmp_path / "val", num=2)
    data = open_data(str(tmp_path), may_be_unlabelled=True)
    assert (data.classes, data.num_classes, count_images(data.train)) == (("cat", "dog"), 2, 5)


def test_images_without_any_labels_have_no_classes(tmp_path):
    make_folder(tmp_path, ["all"], num=10)
    data = open_data(str(tmp_path / "all"), may_be_unlabelled=True)
    assert (data.classes, data.num_classes, data.is_labelled) == (None, 0, False)
    assert [count_images(part) for part in data.parts] == [8, 2]
    make_folder(tmp_path / "two", ["train", "val"], num=3)
    data = open_data(str(tmp_path / "two"), may_be_unlabelled=True)
    assert (data.classes, data.num_classes, data.is_labelled) == (None, 0, False)


# Folders that are refused


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; expected a folder of images, or .*torch/"):
        open_data(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_a_folder_without_images_is_refused(tmp_path, is_evaluation):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=rf"^{tmp_path} holds no images"):
        open_data(str(tmp_path), is_evaluation=is_evaluation)


def test_a_folder_with_hidden_images_alone_is_refused(tmp_path):
    make_folder(tmp_path, [".cache"])
    with pytest.raises(DataError, match=r"holds no images$"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_one_class_is_refused(tmp_path, is_evaluation):
    make_folder(tmp_path, ["cat"])
    with pytest.raises(DataError, match=r"has one class \(cat\); expected at least two, each a folder"):
        open_data(str(tmp_path), is_evaluation=is_evaluation)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images_is_refused(tmp_path, part):
    make_two_folders(tmp_path)
    (tmp_path / part / "bird").mkdir()
    with pytest.raises(DataError, match=rf"1 class is without images in {tmp_path}/{part}: bird; fill or remove"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("locked", ["train/cat", "val", "."])
def test_folders_that_may_not_be_read_are_not_taken_for_empty_ones(tmp_path, monkeypatch, locked):
    make_two_folders(tmp_path)
    path, access = tmp_path / locked, os.access
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != path and access(asked, mode))  # root may read all
    with pytest.raises(DataError, match=f"1 folder is not readable, for want of rights: {path}"):
        open_data(str(tmp_path))


def test_images_beside_the_classes_are_refused(tmp_path):
    make_two_folders(tmp_path)
    make_image(0).save(tmp_path / "train" / "stray.png")
    match = r"1 image is in .*/train beside the folders of classes: .*/stray.png; expected .*/train/CLASS/IMAGE"
    with pytest.raises(DataError, match=match):
        open_data(str(tmp_path))


def test_folders_within_classes_are_refused(tmp_path):
    """timm would take `2024` as one class, of cats and of dogs."""
    make_folder(tmp_path / "cat", ["2024"], num=3)
    make_folder(tmp_path / "dog", ["2024", "2025"], num=3)
    with pytest.raises(DataError, match=r"9 images are in folders within the folders of .*2024/0.png.*CLASS/IMAGE"):
        open_data(str(tmp_path))


def test_images_without_classes_are_refused(tmp_path):
    make_folder(tmp_path, ["all"])
    for is_evaluation in (False, True):
        with pytest.raises(DataError, match=r"the images of .*all lie in no folders of classes; expected .*all/CLASS/"):
            open_data(str(tmp_path / "all"), is_evaluation=is_evaluation)
    make_folder(tmp_path / "two", ["train", "val"])
    with pytest.raises(DataError, match=r"the images of .*train lie in no folders of classes"):
        open_data(str(tmp_path / "two"))


def test_validation_images_without_classes_are_refused(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path, ["val"])
    with pytest.raises(DataError, match=r"the images of .*val lie in no folders of classes"):
        open_data(str(tmp_path))


def test_classes_that_differ_are_refused(tmp_path):
    make_folder(tmp_path / "train", ["cat", "dog", "bird"])
    make_folder(tmp_path / "val", ["cat", "dog", "fish"])
    with pytest.raises(DataError, match=r"differ, only in train/: bird; only in val/: fish; both need the same"):
        open_data(str(tmp_path))


def test_many_names_are_shortened(tmp_path):
    make_folder(tmp_path / "train", [*"abcdefgh", "x"], num=1)
    make_folder(tmp_path / "val", ["x"], num=1)
    with pytest.raises(DataError, match=r"only in train/: a, b, c, d, e, \.\.\.; both"):
        open_data(str(tmp_path))


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path, ["car", "plane", "train"], num=5)
    assert open_data(str(tmp_path)).classes == ("car", "plane", "train")
    assert open_data(str(tmp_path), is_evaluation=True).num_classes == 3


def test_one_half_alone_is_refused(tmp_path):
    make_folder(tmp_path / "a" / "train")
    make_folder(tmp_path / "b" / "test")
    with pytest.raises(DataError, match=r"a has train/ and no val/; expected both, or folders of classes alone"):
        open_data(str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"a has train/ and no val/"):
        open_data(str(tmp_path / "a"), is_evaluation=True)
    with pytest.raises(DataError, match=r"b has test/ and no train/; expected both"):
        open_data(str(tmp_path / "b"))


def test_one_image_a_class_leaves_none_to_validate_on(tmp_path):
    make_folder(tmp_path, num=1)
    with pytest.raises(DataError, match="one image a class, which leaves none to validate on; give train/ and val/"):
        open_data(str(tmp_path))


# Names of timm's


def make_fashion_mnist(root, num=12):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = np.arange(num * 28 * 28).astype(np.uint8).tobytes()
        labels = bytes(i % 10 for i in range(num))
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4i", 2051, num, 28, 28) + images)
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2i", 2049, num) + labels)
        for kind, digits in (("images", 3), ("labels", 1)):
            name = f"{part}-{kind}-idx{digits}-ubyte"
            (folder / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))


def test_a_set_of_torchvisions_is_found(tmp_path):
    make_fashion_mnist(tmp_path)
    data = open_data(f"torch/fashion_mnist:{tmp_path}")
    assert data.num_classes == 10
    assert data.classes[9] == "Ankle boot"
    assert list_targets(data.train) == [*range(10), 0, 1]
    assert get_name(data.train, 3) == "image 3"
    assert open_data(f"torch/fashion_mnist:{tmp_path}", is_evaluation=True).train is None


def test_torchvisions_folders_have_paths_for_names(tmp_path):
    make_two_folders(tmp_path)
    data = open_data(f"torch/folder:{tmp_path}")
    assert data.classes == ("cat", "dog")
    assert get_name(data.val, 3) == str(tmp_path / "val" / "dog" / "1.png")


def test_classes_with_several_names_are_counted_once():
    images = FakeData(2)
    images.classes = [("tench", "Tinca tinca"), ("crane",), ("crane", "bird")]  # as torchvision's ImageNet
    images.class_to_idx = {"tench": 0, "Tinca tinca": 0, "crane": 2, "bird": 2}
    assert list_classes(images) == ("tench, Tinca tinca", "crane", "crane, bird")


def test_a_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"torch/cifar10:.* cannot be opened, split train: Dataset not found"):
        open_data(f"torch/cifar10:{tmp_path}")


def test_an_unknown_set_is_refused(tmp_path):
    match = r"^torch/nonsense:.* cannot be opened, split train: Unknown torchvision dataset nonsense$"
    with pytest.raises(DataError, match=match):
        open_data(f"torch/nonsense:{tmp_path}")


def test_shards_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'nowhere'}"):
        open_data(f"wds/:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("name", ["torch/cifar10", "wds/"])
def test_a_name_without_its_root_is_refused(name):
    with pytest.raises(DataError, match=rf"^{name} does not say where the images are; expected {name}:ROOT$"):
        open_data(name)


def test_a_package_that_is_missing_is_named_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)  # imported by another test
    with pytest.raises(DataError, match=r"^hfds/user/name needs a package that is not installed: [^\n]*; pip install"):
        open_data("hfds/user/name")
    assert capsys.readouterr().out == ""


# Streams

stream = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files open


@pytest.fixture
def shards(tmp_path):
    yield tmp_path
    gc.collect()  # while the warnings are ignored


@stream
def test_the_classes_of_a_stream_are_counted(shards):
    make_shards(shards, "train", [0, 1, 2] * 4, [6, 6])
    make_shards(shards, "validation", [2, 1, 0, 1], [2, 2])
    data = open_data(f"wds/:{shards}")
    assert (data.num_classes, data.classes) == (3, None)
    assert [count_images(part) for part in data.parts] == [12, 4]
    assert list_targets(data.val) is None


@stream
def test_the_splits_of_a_stream_can_be_named(shards):
    make_shards(shards, "few", [0, 1] * 3, [3, 3])
    make_shards(shards, "held", [1, 0], [2])
    data = open_data(f"wds/:{shards}", options={"train_split": "few", "val_split": "held-00.tar|2"})
    assert [count_images(part) for part in data.parts] == [6, 2]
    assert data.describe()["sizes"] == [6, 2]


@stream
def test_a_split_that_is_not_there_is_refused(shards):
    make_shards(shards, "train", [0, 1], [2])
    with pytest.raises(DataError, match="cannot be opened, split validation: split validation not found"):
        open_data(f"wds/:{shards}")


@stream
def test_a_stream_that_does_not_say_how_many_images_it_has_is_refused(shards):
    make_shards(shards, "train", [0, 1], [2])
    data = open_data(f"wds/:{shards}", options={"val_split": "train-{00..00}.tar"})
    with pytest.raises(DataError, match=r"the stream does not say how many images it has; add \|N to its split"):
        count_images(data.val)


def test_labels_that_are_no_plain_list_are_not_listed():
    images = FakeData(2)
    images.targets = torch.zeros(2, 8)  # as QMNIST's
    assert list_targets(images) is None
