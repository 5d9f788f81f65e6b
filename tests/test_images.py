from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from se_inject import inject
from se_inject.errors import ExampleError, OptionError
from se_inject.images import get_class_names, make_transform, predict_image
from se_inject.provenance import Source
from se_inject.rewrite import get_plan
from se_inject.sources import open_network
from tests import nets


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)).save(path)
    return path


def test_timms_own_preprocessing_is_used(picture):
    from timm.data import create_transform, resolve_model_data_config

    network = open_network("inception_v3", pretrained=False)
    expected = create_transform(**resolve_model_data_config(network.model), is_training=False)
    image = Image.open(picture)
    found = make_transform(network.source)(image)
    assert found.shape == (3, 299, 299)
    assert torch.equal(found, expected(image))


def test_torchvisions_own_preprocessing_is_used(picture):
    from se_inject.sources import _read_torchvision_preprocess

    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    source = Source("torchvision", "resnet50", preprocess=_read_torchvision_preprocess(weights))
    image = Image.open(picture)
    assert torch.equal(make_transform(source)(image), weights.transforms()(image))


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_a_network_of_ones_own_gets_the_size_of_its_example(picture, channels, size):
    model = nn.Sequential(nets.conv(channels, 16), *nets.wrap(nets.Residual())[1:])
    plan = get_plan(inject(model, example=torch.zeros(2, channels, size, size)))
    assert make_transform(None, plan)(Image.open(picture)).shape == (channels, size, size)


def test_classes_come_most_probable_first(picture):
    model = timm.create_model("resnet18", num_classes=1000).train()
    transform = make_transform(None)
    classes = predict_image(model, picture, transform, top_k=3)
    assert model.training
    probabilities = [item.probability for item in classes]
    assert probabilities == sorted(probabilities, reverse=True)
    scores = model.eval()(transform(Image.open(picture))[None])[0].softmax(0)
    assert classes[0].index == scores.argmax().item()
    assert classes[0].probability == pytest.approx(scores.max().item())


def test_class_names_are_imagenets_where_the_number_fits():
    assert [get_class_names(1000)(i) for i in (282, 967, 985)] == ["tiger cat", "espresso", "daisy"]
    assert get_class_names(10)(3) == "class 3"


def test_bad_images_are_named(tmp_path, picture):
    model, transform = timm.create_model("resnet18"), make_transform(None)
    with pytest.raises(ExampleError, match="none.png cannot be read: No such file"):
        predict_image(model, tmp_path / "none.png", transform)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ExampleError, match="text.png cannot be read: it is no image that Pillow can read"):
        predict_image(model, tmp_path / "text.png", transform)
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:5000])
    with pytest.raises(ExampleError, match="cut.png cannot be read"):
        predict_image(model, tmp_path / "cut.png", transform)
    (tmp_path / "odd.ppm").write_bytes(b"P6 8 8\xb3 255\n" + bytes(192))
    with pytest.raises(ExampleError, match="odd.ppm cannot be read: invalid literal"):
        predict_image(model, tmp_path / "odd.ppm", transform)
    with pytest.raises(OptionError, match="top-k is 0"):
        predict_image(model, picture, transform, top_k=0)
    with pytest.raises(ExampleError, match="gives no scores"):
        predict_image(nets.UNet(), Path(picture), transform)
