import gc
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image, features
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from se_inject.contents import get_name
from se_inject.datasets import Data, open_data
from se_inject.errors import DataError
from se_inject.formats import InputFormat, convert_image, make_eval_transform, make_train_transform, read_format
from se_inject.images import make_transform
from se_inject.loaders import EvalLoader, TrainLoader, _prepare_worker, _say_plainly
from se_inject.provenance import Source
from se_inject.reading import NO_LABEL, UNREADABLE, seed_all
from se_inject.recipe import Recipe
from se_inject.validation import open_validation
from se_inject.world import World
from tests.images_on_disk import make_folder, make_image, make_shards, make_two_folders

ALONE = World(torch.device("cpu"))
PAIR = [World(torch.device("cpu"), rank, 2) for rank in range(2)]
FORM = InputFormat((3, 8, 8))
RECIPE = Recipe(batch_size=4, workers=0)
PLAIN = replace(RECIPE, crop="none", hflip=0.0)


@pytest.fixture
def data(tmp_path):
    return open_data(str(make_two_folders(tmp_path, num=5, num_val=3)))


def load(data, recipe=RECIPE, world=ALONE, form=FORM, **options):
    return TrainLoader(data, form, recipe, world, **options)


def load_eval(data, workers=0, world=ALONE, form=FORM, batch_size=4, **options):
    return EvalLoader(data.val, form, batch_size=batch_size, workers=workers, world=world, **options)


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def sort_images(batches):
    """Bring images into an order of their own, to compare sets of them."""
    return sorted((image.flatten().tolist() for images, _ in batches for image in images))


def join(batches):
    batches = list(batches)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


# What a batch is a function of


def test_batches_are_images_and_labels(data):
    batches = list(load(data).iterate(0))
    assert [images.shape for images, _ in batches] == [(4, 3, 8, 8)] * 2
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    assert load(data).num_steps == 2


def test_batches_do_not_depend_on_the_number_of_workers(data):
    with_workers = load(data, replace(RECIPE, workers=2))
    for epoch in (0, 1):
        assert_same(load(data).iterate(epoch), with_workers.iterate(epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_begun_at_any_step(data, workers):
    loader = load(data, replace(RECIPE, batch_size=3, workers=workers))
    whole = list(loader.iterate(5))
    assert len(whole) == 3
    assert_same(loader.iterate(5, first=1), whole[1:])
    assert list(loader.iterate(5, first=3)) == []


def test_an_epoch_that_was_left_can_be_read_again(data):
    loader = load(data, replace(RECIPE, workers=2))
    batches = loader.iterate(0)
    next(batches)
    batches.close()
    assert_same(loader.iterate(0), load(data).iterate(0))


def test_processes_share_the_images_of_a_batch(data):
    whole = list(load(data).iterate(3))
    shares = [list(load(data, world=world).iterate(3)) for world in PAIR]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [len(images) for images, _ in parts] == [2, 2]
        assert sort_images(parts) == sort_images([batch])


def test_epochs_and_seeds_have_orders_of_their_own(data):
    recipe = replace(PLAIN, batch_size=10)
    first = next(load(data, recipe).iterate(0))[0]
    for other in (load(data, recipe).iterate(1), load(data, replace(recipe, seed=1)).iterate(0)):
        images = next(other)[0]
        assert not torch.equal(images, first)
        assert sort_images([(images, None)]) == sort_images([(first, None)])


def test_an_image_is_augmented_in_another_way_in_another_epoch(data):
    recipe = replace(RECIPE, batch_size=10)
    first, second = (sort_images(load(data, recipe).iterate(epoch)) for epoch in (0, 1))
    assert not any(image in second for image in first)


def test_the_augmentation_of_an_image_does_not_depend_on_the_others(data):
    alone = sort_images(load(data, replace(RECIPE, batch_size=1)).iterate(2))
    together = sort_images(load(data, replace(RECIPE, batch_size=10)).iterate(2))
    assert alone == together


def test_the_remainder_of_an_epoch_is_left_out(data):
    assert [len(images) for images, _ in load(data, replace(RECIPE, batch_size=7)).iterate(0)] == [7]


def test_validation_has_each_image_once_and_in_order(data):
    for workers in (0, 2):
        batches = list(load_eval(data, workers))
        assert [len(images) for images, _ in batches] == [4, 2]
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
        assert_same(batches, load_eval(data))


def test_processes_share_the_validation_images(data):
    loaders = [load_eval(data, world=world, batch_size=2) for world in PAIR]
    whole = list(load_eval(data, batch_size=1))
    for rank, loader in enumerate(loaders):
        assert loader.num_own == 3
        assert len(list(loader)) == 2
        assert_same([join(loader)], [join(whole[rank::2])])


def test_more_processes_than_images_leave_some_without(data):
    few = Data(None, torch.utils.data.Subset(data.val, [0]), data.classes, 2, "few")
    assert [len(list(load_eval(few, world=world))) for world in PAIR] == [1, 0]


# What is refused


def test_fewer_images_than_a_batch_are_refused(data):
    with pytest.raises(DataError, match=r"there are 10 training images, batch_size is 64; try --set batch_size=10$"):
        load(data, replace(RECIPE, batch_size=64))


def test_a_batch_that_processes_cannot_share_is_refused(data):
    world = World(torch.device("cpu"), 0, 3)
    with pytest.raises(
        DataError, match="batch_size is 10, which 3 processes cannot share evenly; try --set batch_size=9"
    ):
        load(data, replace(RECIPE, batch_size=10), world)
    with pytest.raises(DataError, match="there are 10 training images, batch_size is 12; try --set batch_size=9"):
        load(data, replace(RECIPE, batch_size=12), world)


def test_a_share_that_cannot_be_mixed_in_pairs_is_refused(data):
    recipe = replace(RECIPE, batch_size=6, mixup=0.2)
    load(data, recipe)
    message = "mix pairs, and of a batch of 6 images each process has 3; try --set batch_size=8"
    with pytest.raises(DataError, match=message):
        load(data, recipe, PAIR[0])


def test_images_that_are_kept_stay_as_they_are(data):
    loader = load_eval(data, cache=2**20)
    first = [images.clone() for images, _ in loader]
    for _ in range(2):
        for images, _ in loader:
            images.mul_(2)  # as a network does that normalises what it is handed
    assert all(map(torch.equal, first, (images for images, _ in loader)))
    for images, _ in (loader := load_eval(data, cache=2**20)):
        images.zero_()
    assert all(map(torch.equal, first, (images for images, _ in loader)))


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_beyond_the_network_are_refused_in_one_line(data, tmp_path, workers):
    match = rf"^{tmp_path}/train/dog/\d.png has the label 1, the network has 1 classes$"
    with pytest.raises(DataError, match=match):
        list(load(data, replace(RECIPE, workers=workers), num_classes=1).iterate(0))
    with pytest.raises(DataError, match=match.replace("train", "val")):
        list(load_eval(data, workers, num_classes=1))


def test_workers_end_by_themselves_after_an_error(data, monkeypatch):
    # torch waits five seconds for each worker that it cannot reach any more, and ends it by force.
    forced = []
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "terminate", forced.append)
    with pytest.raises(DataError):
        list(load(data, replace(RECIPE, workers=2), num_classes=1).iterate(0))
    gc.collect()
    assert not forced
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_told_of_in_one_line():
    from se_inject.loaders import _say_plainly

    def die():
        yield None
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nsecond line")

    with pytest.raises(DataError, match=r"ended \(DataLoader worker \(pid 7\) is killed by signal: Killed\.\); it may"):
        list(_say_plainly(die()))


def test_other_errors_are_left_as_they_are():
    from se_inject.loaders import _say_plainly

    def fail():
        yield None
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="^a bug$"):
        list(_say_plainly(fail()))


# Images that cannot be read


def spoil(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image at all")
    elif kind == "gone":
        path.unlink()
    else:
        make_image(0, (64, 64)).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:700])


@pytest.fixture
def spoilt(tmp_path):
    make_two_folders(tmp_path, num=5, num_val=3, suffix=".jpg")
    data = open_data(str(tmp_path))
    for name, kind in (("train/cat/1", "empty"), ("train/dog/0", "truncated"), ("val/cat/0", "text"),
                       ("val/dog/2", "truncated"), ("val/dog/1", "gone")):  # fmt: skip
        spoil(tmp_path / f"{name}.jpg", kind)
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_noted(spoilt, tmp_path, workers):
    loader = load_eval(spoilt, workers, max_bad=3)
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [UNREADABLE, 0, 0, 1, UNREADABLE, UNREADABLE]
    assert loader.bad.list_names() == [str(tmp_path / "val" / f) for f in ("cat/0.jpg", "dog/1.jpg", "dog/2.jpg")]
    loader.bad.check()


@pytest.mark.parametrize("workers", [0, 2])
def test_more_unreadable_images_than_allowed_are_an_error_that_names_them(spoilt, tmp_path, workers):
    loader = load_eval(spoilt, workers, max_bad=2)
    list(loader)
    match = rf"^3 images cannot be read, at most 2 are skipped: {tmp_path}/val/cat/0.jpg, .*--max-bad 3$"
    with pytest.raises(DataError, match=match):
        loader.bad.check()


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_image_takes_the_place_of_an_unreadable_one(spoilt, tmp_path, workers):
    loader = load(spoilt, replace(PLAIN, batch_size=10, workers=workers), max_bad=2)
    images, labels = next(loader.iterate(0))
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5
    assert len({str(image) for image in sort_images([(images, None)])}) == 8
    assert loader.bad.list_names() == [str(tmp_path / "train" / f) for f in ("cat/1.jpg", "dog/0.jpg")]
    loader.bad.check()


def test_a_worker_that_cannot_hand_on_what_it_read_ends():
    """As where there is no shared memory left; a function cannot be handed on either, and torch would wait for ever."""
    loader = DataLoader([0, 1], num_workers=1, collate_fn=lambda _: lambda: 0, worker_init_fn=_prepare_worker)
    with pytest.raises(DataError, match=r"^a process that reads images ended .*/dev/shm"):
        list(_say_plainly(loader))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_broken_avif_is_noted_too(tmp_path):
    """Pillow raises a RuntimeError for it."""
    data = open_data(str(make_two_folders(tmp_path, num=5, num_val=3)))
    bad = tmp_path / "val" / "cat" / "0.png"
    make_image(0).save(bad, "AVIF")
    bad.write_bytes(bad.read_bytes().replace(b"pitm", b"none"))
    loader = load_eval(data, max_bad=1)
    assert torch.cat([labels for _, labels in loader])[0] == UNREADABLE
    assert loader.bad.list_names() == [str(bad)]


def test_one_unreadable_image_is_not_several(tmp_path):
    data = open_data(str(make_two_folders(tmp_path)))
    spoil(tmp_path / "train/cat/0.png", "text")
    loader = load(data)
    list(loader.iterate(0))
    with pytest.raises(DataError, match=r"^1 image cannot be read, at most 0 are skipped: .*/cat/0.png; mend"):
        loader.bad.check()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_none_of_which_can_be_read_are_named(tmp_path, workers):
    data = open_data(str(make_two_folders(tmp_path)))
    for path in (tmp_path / "train").rglob("*.png"):
        spoil(path, "empty")
    recipe = replace(RECIPE, workers=workers)
    with pytest.raises(DataError, match=r"^8 images cannot be read, at most 0 are skipped: .*cat/0.png"):
        list(load(data, recipe).iterate(0))
    with pytest.raises(DataError, match=r"^none of the images can be read$"):
        list(load(data, recipe, max_bad=8).iterate(0))


def test_what_processes_note_is_shared(spoilt, monkeypatch):
    loader = load_eval(spoilt)
    list(loader)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flags: flags.add_(torch.tensor([1, 1, 0, 0, 0, 0])))
    loader.bad.share(PAIR[0])
    assert [name[-9:] for name in loader.bad.list_names()] == ["cat/0.jpg", "cat/1.jpg", "dog/1.jpg", "dog/2.jpg"]


# Colours and sizes


@pytest.mark.parametrize(("mode", "suffix"), [
    ("L", ".png"), ("LA", ".png"), ("RGBA", ".png"), ("P", ".png"), ("CMYK", ".jpg"), ("1", ".png"), ("I;16", ".png"),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_all_kinds_of_images_are_read(tmp_path, mode, suffix, channels):
    make_two_folders(tmp_path, mode="RGB" if mode == "I;16" else mode, suffix=suffix)
    if mode == "I;16":
        values = np.random.default_rng(0).integers(0, 2**16, (16, 16)).astype(np.uint16)
        for path in tmp_path.rglob("*.png"):
            Image.fromarray(values).save(path)
    form = InputFormat((channels, 8, 8), (0.5,) * channels, (0.25,) * channels)
    data = open_data(str(tmp_path), mode=form.mode)
    for batches in (load(data, form=form).iterate(0), load_eval(data, form=form)):
        images, _ = next(iter(batches))
        assert images.shape == (4, channels, 8, 8)
        assert -2 <= images.min() < images.max() <= 2


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    found = np.asarray(convert_image(Image.fromarray(values), "RGB"))
    assert found[0, :, 1].tolist() == [0, 1, 128, 255]
    dark = np.array([[0, 128, 255]], np.uint16)
    assert np.asarray(convert_image(Image.fromarray(dark), "L")).tolist() == [[0, 0, 1]]


def test_wide_types_are_scaled_by_what_they_hold():
    for values, expected in (([0, 7, 255], [0, 7, 255]), ([0, 257, 65535], [0, 1, 255])):
        assert np.asarray(convert_image(Image.fromarray(np.array([values], np.int32)), "L")).tolist() == [expected]
    for values, expected in (([0, 0.5, 1], [0, 128, 255]), ([0, 7.4, 255], [0, 7, 255])):
        assert np.asarray(convert_image(Image.fromarray(np.array([values], np.float32)), "L")).tolist() == [expected]


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m1-mstd0.5", "v0", "original", "augmix-m3-w3"])
def test_timms_policies_take_every_image(policy):
    """Pillow refuses the no bits that some of them keep, from 13 on."""
    transform = make_train_transform(FORM, replace(RECIPE, auto_augment=policy))
    for i in range(150):
        seed_all(i)
        assert transform(make_image(i)).shape == (3, 8, 8)


def test_colours_are_jittered_beside_a_policy():
    recipe = replace(RECIPE, color_jitter=0.4, auto_augment="rand-m9-mstd0.5")
    names = [type(step).__name__ for step in make_train_transform(FORM, recipe).transforms]
    assert {"ColorJitter", "RandAugment"} <= set(names)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = make_image(0).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "p.png") as found:
        assert found.mode == "P"
        assert np.array_equal(np.asarray(convert_image(found, "RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3)])
@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_images_of_any_size_become_the_same(size, crop):
    transform = make_train_transform(FORM, replace(RECIPE, crop=crop))
    assert transform(make_image(0, size)).shape == (3, 8, 8)
    assert make_eval_transform(FORM)(make_image(0, size)).shape == (3, 8, 8)


def test_without_crops_an_image_is_only_resized():
    image = make_image(0, (16, 12))
    expected = image.resize((8, 8), Image.Resampling.BILINEAR)
    found = make_train_transform(FORM, PLAIN)(image)
    assert np.array_equal(np.asarray(found), np.asarray(expected).transpose(2, 0, 1))


def test_padded_crops_shift_an_image_by_up_to_an_eighth():
    form = InputFormat((3, 16, 16))
    image = make_image(0)
    whole = np.pad(np.asarray(image).transpose(2, 0, 1), ((0, 0), (2, 2), (2, 2)))
    transform = make_train_transform(form, replace(PLAIN, crop="padded"))
    places = set()
    for i in range(60):
        seed_all(0, i)
        found = np.asarray(transform(image))
        places |= {
            (y, x) for y in range(5) for x in range(5) if np.array_equal(found, whole[:, y : y + 16, x : x + 16])
        }
    assert {y for y, _ in places} == {x for _, x in places} == set(range(5))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [
    {"auto_augment": "rand-m9-mstd0.5"}, {"color_jitter": 0.4}, {"vflip": 1.0}, {"auto_augment": "original"},
])  # fmt: skip
def test_augmentations_work_on_grey_and_on_coloured_images(channels, options):
    form = InputFormat((channels, 8, 8), (0.5,) * channels, (0.25,) * channels)
    transform = make_train_transform(form, replace(RECIPE, crop="padded", **options))
    for seed in range(20):
        seed_all(seed)
        found = transform(make_image(seed, (8, 8), form.mode))
        assert (found.shape, found.dtype) == ((channels, 8, 8), torch.uint8)


# What validation does


def normalise(form, pixels):
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (form.mean, form.std))
    return (torch.as_tensor(np.asarray(pixels)).float() / 255 - mean) / std


@pytest.mark.parametrize("name", ["resnet18", "inception_v3", "efficientnet_b0", "mobilenetv3_large_100"])
def test_validation_does_what_timm_does(name):
    config = resolve_model_data_config(None, {}, timm.get_pretrained_cfg(name).to_dict())
    form = read_format({"library": "timm", **config}, (3, 99, 99), input_size=None, in_chans=3)
    image = make_image(0, (300, 260))
    expected = create_transform(**config, is_training=False)(image)
    # timm's loader takes the mean from values up to 255, its transform from values up to 1
    torch.testing.assert_close(normalise(form, make_eval_transform(form)(image)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_crop_of_a_source_is_kept(crop_mode):
    config = {"input_size": (3, 24, 24), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3,
              "crop_pct": 0.9, "crop_mode": crop_mode}  # fmt: skip
    form = read_format({"library": "timm", **config}, (3, 99, 99), input_size=None, in_chans=3)
    image = make_image(0, (50, 40))
    expected = create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(normalise(form, make_eval_transform(form)(image)), expected, rtol=0, atol=1e-5)
    source = Source("timm", "resnet18", preprocess=form.to_preprocess())  # predict does the same
    assert torch.equal(make_transform(source)(image), expected)


def test_batches_are_normalised(data):
    form = InputFormat((3, 16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images, _ = next(iter(load_eval(data, form=form)))
    with Image.open(get_name(data.val, 0)) as image:
        expected = normalise(form, make_eval_transform(form)(image))
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("crop_size", "resize_size"), [(224, 232), (299, 342), (32, 93), (40, 71), (480, 480)])
def test_validation_does_what_torchvision_does(crop_size, resize_size):
    """Of 32 over 93, timm would make 92 again."""
    preset = ImageClassification(crop_size=crop_size, resize_size=resize_size, interpolation=InterpolationMode.BILINEAR)
    values = {"library": "torchvision", "crop_size": crop_size, "resize_size": resize_size, "interpolation": "bilinear",
              "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip
    form = read_format(values, (3, 99, 99), input_size=None, in_chans=3)
    image = make_image(0, (150, 130))
    assert form.size == (3, crop_size, crop_size)
    torch.testing.assert_close(normalise(form, make_eval_transform(form)(image)), preset(image), rtol=0, atol=1e-5)


def test_a_source_that_says_nothing_gets_imagenets_statistics():
    form = read_format({}, (3, 48, 48), input_size=None, in_chans=3)
    assert form == InputFormat((3, 48, 48), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1.0, "bilinear", "center")
    grey = read_format({}, (1, 48, 48), input_size=None, in_chans=1)
    assert (grey.mode, grey.size) == ("L", (1, 48, 48))
    assert grey.mean == pytest.approx((0.449,))
    assert grey.std == pytest.approx((0.226,))


def test_the_size_can_be_set():
    values = {"library": "timm", "input_size": [3, 224, 224], "crop_pct": 0.875, "mean": [0.5] * 3, "std": [0.5] * 3}
    form = read_format(values, (3, 99, 99), input_size=64, in_chans=3)
    assert (form.size, form.crop_pct, form.mean) == ((3, 64, 64), 0.875, (0.5, 0.5, 0.5))
    assert read_format({}, (3, 99, 99), input_size=64, in_chans=3) == InputFormat((3, 64, 64))


def test_channels_that_images_do_not_have_are_refused():
    with pytest.raises(DataError, match=r"the network takes images with 4 channels; expected 1 \(grey\) or 3 \(RGB\)"):
        read_format({}, (4, 8, 8), input_size=None, in_chans=4)


# Streams

stream = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",  # webdataset leaves its files open
    "ignore:Length of IterableDataset:UserWarning",
)


@pytest.fixture
def shards(tmp_path):
    make_shards(tmp_path, "train", [0, 1, 2] * 7, [7, 7, 7])
    make_shards(tmp_path, "validation", [2, 1, 0, 1, 1], [3, 2])
    yield open_data(f"wds/:{tmp_path}")
    gc.collect()  # while the warnings are ignored


@stream
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_image_of_a_stream_is_validated_once(shards, workers):
    loader = load_eval(shards, workers, batch_size=2, num_classes=3)
    assert loader.is_stream
    for _ in range(2):
        assert sorted(torch.cat([labels for _, labels in loader]).tolist()) == [0, 1, 1, 1, 2]
    assert loader.num_images == 5


@stream
def test_a_stream_can_be_loaded_again_with_other_workers(shards):
    for workers in (0, 2, 0):
        assert sum(len(labels) for _, labels in load_eval(shards, workers)) == 5
        assert len(list(load(shards, replace(RECIPE, workers=workers)).iterate(0))) == 5


@stream
def test_one_process_validates_a_stream(shards):
    found = [
        torch.cat([torch.tensor([], dtype=torch.int64), *(y for _, y in load_eval(shards, world=w))]) for w in PAIR
    ]
    assert [len(labels) for labels in found] == [5, 0]


@stream
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 9, 21])
def test_an_epoch_of_a_stream_has_all_its_steps(shards, workers, batch_size):
    loader = load(shards, replace(RECIPE, workers=workers, batch_size=batch_size))
    assert loader.is_stream
    assert loader.num_steps == 21 // batch_size
    for epoch in (0, 1):
        batches = list(loader.iterate(epoch))
        assert [len(labels) for _, labels in batches] == [batch_size] * (21 // batch_size)
    assert len(list(loader.iterate(0, first=loader.num_steps - 1))) == 1


@stream
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_stream_does_not_depend_on_the_one_before(shards, workers):
    recipe = replace(RECIPE, batch_size=4, workers=workers)
    loader = load(shards, recipe)
    list(loader.iterate(0))
    again, anew = list(loader.iterate(1)), list(load(shards, recipe).iterate(1))
    for (images, labels), (others, other_labels) in zip(again, anew, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@stream
def test_a_stream_has_no_more_workers_than_files(tmp_path):
    make_shards(tmp_path, "train", [0, 1] * 4, [8])
    make_shards(tmp_path, "validation", [0, 1, 1], [3])
    data = open_data(f"wds/:{tmp_path}")
    loader = load(data, replace(RECIPE, workers=2))
    assert [len(labels) for _, labels in loader.iterate(0)] == [4, 4]
    assert loader._batches.loader.num_workers == 1
    assert sum(len(labels) for _, labels in load_eval(data, 2)) == 3


@stream
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_beyond_the_network_are_refused_in_a_stream(shards, workers):
    match = r"^an image of the stream has the label 2, the network has 2 classes$"
    with pytest.raises(DataError, match=match):
        list(load(shards, replace(RECIPE, workers=workers), num_classes=2).iterate(0))
    with pytest.raises(DataError, match=match):
        list(load_eval(shards, workers, num_classes=2))


@stream
def test_a_stream_with_fewer_images_than_it_says_is_an_error(shards):
    loader = load(shards, replace(RECIPE, batch_size=4))
    batches = list(loader.iterate(0))[:3]
    loader._open = lambda epoch: batches
    with pytest.raises(DataError, match="the stream gave 3 batches in an epoch; it says that it has images for 5"):
        list(loader.iterate(0))


@stream
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_of_a_stream_are_named_and_counted(tmp_path, workers, capfd):
    make_shards(tmp_path, "train", [0, 1, 2] * 7, [7, 7, 7], broken=[3, 9])
    make_shards(tmp_path, "validation", [2, 1, 0, 1, 1], [3, 2], broken=[4])
    data = open_data(f"wds/:{tmp_path}")
    names = [f"{tmp_path}/train-00.tar:train0003", f"{tmp_path}/train-01.tar:train0009"]
    loader = load(data, replace(RECIPE, batch_size=4, workers=workers), max_bad=1)
    for epoch in range(2):  # the same images are met again
        assert len(list(loader.iterate(epoch))) == 5
    assert loader.bad.list_names() == names
    with pytest.raises(DataError, match=rf"^2 images cannot be read, at most 1 are skipped: {', '.join(names)}; mend"):
        loader.bad.check()
    last = f"{tmp_path}/validation-01.tar:validation0004"
    with pytest.raises(DataError, match=f"^1 image cannot be read, at most 0 are skipped: {last}; mend or remove"):
        list(load_eval(data, workers))
    allowed = load_eval(data, workers, max_bad=1)
    assert sorted(torch.cat([labels for _, labels in allowed]).tolist()) == [0, 1, 1, 2]
    assert allowed.bad.list_names() == [last]
    assert capfd.readouterr().err == ""


@stream
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_stream_gives_the_pixels_that_a_folder_gives(tmp_path, mode):
    values = np.linspace(0, 2**16 - 1, 256).astype(np.uint16).reshape(16, 16)
    make_shards(tmp_path / "shards", "train", [0, 1], [2])
    make_shards(tmp_path / "shards", "validation", [0, 1], [2], make=lambda _: Image.fromarray(values))
    make_two_folders(tmp_path / "folder")
    for path in (tmp_path / "folder" / "val").rglob("*.png"):
        Image.fromarray(values).save(path)
    form = InputFormat((len(mode), 16, 16))
    streamed, read = (
        next(iter(load_eval(open_data(name, mode=mode), form=form)))[0][0]
        for name in (f"wds/:{tmp_path / 'shards'}", str(tmp_path / "folder"))
    )
    assert torch.equal(streamed, read)
    assert len(read.unique()) > 100


@stream
@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_that_ends_early_is_named(shards, tmp_path, workers):
    path = tmp_path / "validation-00.tar"
    path.write_bytes(path.read_bytes()[:1500])  # within the first image
    with pytest.raises(DataError, match=f"^2 images cannot be read, .*: {path}, {path}:validation0000; mend or remove"):
        list(load_eval(shards, workers))
    with pytest.raises(DataError, match=r"^the stream gave 2 images, it says that it has 5; .*, or .* --max-bad 3$"):
        list(load_eval(shards, workers, max_bad=2))
    assert sum(len(labels) for _, labels in load_eval(shards, workers, max_bad=3)) == 2


@stream
def test_a_stream_with_more_images_than_it_says_is_an_error(tmp_path):
    make_shards(tmp_path, "train", [0, 1], [2])
    make_shards(tmp_path, "held", [1, 0, 1], [3])
    data = open_data(f"wds/:{tmp_path}", options={"val_split": "held-00.tar|2"})
    with pytest.raises(DataError, match=r"^the stream gave 3 images, it says that it has 2; .*_info.json\)$"):
        list(load_eval(data, 0))


@stream
def test_names_of_a_stream_are_shared_by_processes_and_removed(shards):
    bad = load_eval(shards, 0).bad
    bad.note("a\nb")
    bad.note("c")
    world = SimpleNamespace(size=2, collect=lambda names: [names, ["c", "d"]])
    bad.share(world)
    assert bad.list_names() == ["a b", "c", "d"]
    path = bad._path
    assert path.exists()
    del bad
    gc.collect()
    assert not path.exists()


@stream
def test_a_stream_of_fewer_images_than_a_batch_is_refused(shards):
    assert isinstance(shards.train, IterableDataset)
    with pytest.raises(DataError, match="there are 21 training images, batch_size is 22"):
        load(shards, replace(RECIPE, batch_size=22))


# Sets of the Hugging Face library, from a folder; a hub is asked in the same way.


@pytest.fixture
def hugging(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    make_folder(tmp_path / "set" / "train", ["cat", "dog"], num=10)
    make_folder(tmp_path / "set" / "validation", ["cat", "dog"], num=3, seed=1)
    return f"{tmp_path / 'set'}:{tmp_path / 'cache'}"


@stream
@pytest.mark.parametrize("kind", ["hfds", "hfids"])
@pytest.mark.parametrize("workers", [0, 2])
def test_sets_of_hugging_face_can_be_trained_and_validated_on(hugging, kind, workers):
    open_data(f"hfds/{hugging}")  # how many images a stream has is known from the hub, or from its cache as here
    data = open_data(f"{kind}/{hugging}")
    assert data.classes == ("cat", "dog")
    loader = load(data, replace(RECIPE, workers=workers), num_classes=2)
    assert loader.is_stream == (kind == "hfids")
    for epoch in (0, 1):
        assert [len(labels) for _, labels in loader.iterate(epoch)] == [4] * 5
    found = torch.cat([labels for _, labels in load_eval(data, workers, num_classes=2)])
    assert sorted(found.tolist()) == [0, 0, 0, 1, 1, 1]


@stream
def test_a_set_of_hugging_face_without_labels_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (make_folder(tmp_path / "all", ["cat"], num=3) / "cat").rename(tmp_path / "validation")
    (tmp_path / "all").rmdir()
    name = f"hfds/{tmp_path}:{tmp_path / 'cache'}"
    with pytest.raises(DataError, match=rf"^the images of {name} have no labels; a network is scored on"):
        open_validation(
            lambda: (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)), None), {"name": name},
            World(torch.device("cpu")), batch_size=1, workers=0, input_size=16, max_bad=0,
        )  # fmt: skip


def test_images_without_labels_say_so(tmp_path):
    make_folder(tmp_path, ["all"], num=10)
    data = open_data(str(tmp_path / "all"), may_be_unlabelled=True)
    assert next(load(data).iterate(0))[1].tolist() == [NO_LABEL] * 4
    assert next(iter(load_eval(data)))[1].tolist() == [NO_LABEL] * 2
