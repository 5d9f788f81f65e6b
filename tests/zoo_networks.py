"""Every network of timm and torchvision, built without weights and without the wait for their random numbers."""

import contextlib
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import timm
import timm.layers.weight_init
import torch
import torchvision
from torch import nn

from se_inject.provenance import Source
from se_inject.sources import build_skeleton

SIZES = (64, 96, 128, 192, 224, 256, 384, 512)
SEED = 0
# Detection at the usual 800 pixels and with a thousand proposals takes minutes on a CPU.
SMALL_DETECTION = {"min_size": 96, "max_size": 128}
FEW_PROPOSALS = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}


@dataclass(frozen=True)
class Inputs:
    """What a network is run on; in train mode images want gradients, so that all activations do, with blocks or not."""

    args: tuple
    training: tuple
    how: str


def list_networks():
    """All names, torchvision's first; the families of timm take turns, so that a part of the list is a sample."""
    families = [timm.list_models(module=module) for module in sorted(timm.list_modules())]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*families))
    names = {f"timm:{name}": None for name in (*turns, *timm.list_models()) if name}
    return [*(f"torchvision:{name}" for name in torchvision.models.list_models()), *names]


def make_source(name):
    library, _, short = name.partition(":")
    options = {}
    if library == "torchvision" and is_detection(name) and not short.startswith("ssd"):
        options = SMALL_DETECTION | (FEW_PROPOSALS if "rcnn" in short else {})
    return Source(library, short, options)


def is_detection(name):
    library, _, short = name.partition(":")
    return library == "torchvision" and ".detection." in torchvision.models.get_model_builder(short).__module__


# Random numbers, cheaply: drawn once, copied as often as needed. Its length is prime, so that filters are not alike.
_TILE = torch.empty(1_000_003).uniform_(-1, 1, generator=torch.Generator().manual_seed(SEED))


def fill(tensor, bound, middle=0.0):
    """Fill a tensor with numbers between `middle - bound` and `middle + bound`."""
    with torch.no_grad():
        flat = torch.empty(tensor.numel())
        for start in range(0, tensor.numel(), len(_TILE)):
            part = flat[start : start + len(_TILE)]
            torch.mul(_TILE[: len(part)], bound, out=part)
        tensor.copy_(flat.add_(middle).view(tensor.shape))
    return tensor


class CheapInit:
    """While a network is built, note what it wants to have drawn; `draw` does it, if the network is of interest."""

    def __init__(self):
        self._wanted = []

    @contextmanager
    def patch(self):
        def normal(tensor, mean=0.0, std=1.0, **_):
            return self._note(tensor, std * math.sqrt(3), mean)

        def uniform(tensor, low=0.0, high=1.0, **_):
            return self._note(tensor, (high - low) / 2, (high + low) / 2)

        def truncated(tensor, mean=0.0, std=1.0, *_, **__):
            return self._note(tensor, std * math.sqrt(3), mean)

        with contextlib.ExitStack() as stack:
            for owner, method, function in (
                (torch.Tensor, "normal_", normal),
                (torch.Tensor, "uniform_", uniform),
                (nn.init, "_no_grad_trunc_normal_", truncated),
                (nn.init, "orthogonal_", normal),
                (timm.layers.weight_init, "_trunc_normal_", truncated),
            ):
                stack.enter_context(mock.patch.object(owner, method, function))
            yield

    def _note(self, tensor, bound, middle):
        self._wanted.append((tensor.detach(), bound, middle))
        return tensor

    def draw(self):
        last = {t.data_ptr(): (t, *rest) for t, *rest in self._wanted}  # the second initialisation of a layer counts
        for tensor, bound, middle in last.values():
            fill(tensor, bound, middle)
        self._wanted.clear()


def enliven(model):
    """Give zeros that training moves (norms, layer scales, last layers) values, so that gradients pass."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = name == "weight" and parameter.dim() == 1
            is_scale = parameter.dim() < 2 and "bias" not in name and parameter.abs().max() < 1e-3
            is_layer = name == "weight" and parameter.dim() > 1 and not parameter.any()
            if is_norm or is_scale:
                fill(parameter, 0.25, 0.75)
            elif is_layer:
                fill(parameter, 1 / math.sqrt(parameter[0].numel()))
    return model


def build(name, init):
    """Build a network; its random numbers are drawn by `init.draw()`."""
    torch.manual_seed(SEED)
    with init.patch():
        return build_skeleton(make_source(name))


def propose_inputs(name, model):
    """Propose inputs, the cheapest first."""
    library, _, short = name.partition(":")
    generator = torch.Generator().manual_seed(SEED)

    def image(*shape):
        return torch.rand(shape, generator=generator)

    def make(images, how):
        return Inputs(images, tuple(x.clone().requires_grad_() for x in images), how)

    if library == "torchvision":
        module = torchvision.models.get_model_builder(short).__module__
        if is_detection(name):
            yield _make_detection_inputs(image(2, 3, 96, 96), short)
            return
        if ".optical_flow" in module:
            pair = (image(2, 3, 128, 128), image(2, 3, 128, 128))
            yield make(pair, "2 pairs of 128 x 128")
            return
        if ".video" in module:
            for shape in ((2, 3, 8, 64, 64), (2, 3, 16, 112, 112), (2, 3, 16, 224, 224)):
                yield make((image(*shape),), f"{shape[0]} x {shape[2]} frames of {shape[3]} x {shape[4]}")
            return
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, own = config.get("input_size", (3, 224, 224))[:2] if config else (3, 224)
    sizes = (own,) if config.get("fixed_input_size") else (*SIZES, own)
    for size in dict.fromkeys(sizes):
        yield make((image(2, channels, size, size),), f"2 x {size} x {size}")


def _make_detection_inputs(images, short):
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0], [20.0, 30.0, 90.0, 80.0]]), "labels": torch.tensor([1, 1])}
    if "mask" in short:
        target["masks"] = torch.ones(2, *images.shape[2:], dtype=torch.uint8)
    if "keypoint" in short:
        target["keypoints"] = torch.tensor([[[30.0, 40.0, 1.0]] * 17] * 2)
    training = [x.clone().requires_grad_() for x in images]
    targets = [dict(target) for _ in training]
    return Inputs((list(images),), (training, targets), "2 x 96 x 96, with targets in train mode")
