"""Examples: the input that a network is probed with.

Takes what the caller gave, or finds one from timm's configuration or by usual sizes; gives calls over fake tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from se_inject.calls import MAX_NUMBERS, Call
from se_inject.errors import ExampleError, get_first_line
from se_inject.twin import Twin, get_dtype

Result = TypeVar("Result")

# By the number of spatial dimensions: lengths (audio, ECG), images, and clips or volumes.
_USUAL_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(n,) for n in (1024, 4096, 16000, 5000, 256, 128)],
    2: [(n, n) for n in (224, 32, 64, 128, 256, 299, 384, 512, 28)],
    3: [(16, 112, 112), (8, 64, 64), (32, 32, 32), (64, 64, 64), (16, 224, 224)],
}


def list_calls(twin: Twin, example: object) -> list[Call]:
    """List the calls that a network may run on, the likeliest first.

    Args:
        twin: The network's.
        example: An input (N, C, H, W), a tuple of arguments, a dict of keyword arguments, or the height and width of
            images; from the configuration that timm's networks carry, or of usual sizes, if None.

    Raises:
        ExampleError: It holds no tensor, or is a size below 1.
    """
    if example is None or isinstance(example, int):
        return list(_propose_calls(twin, example))
    return [_fake_call(twin, example)]


def _fake_call(twin: Twin, example: object) -> Call:
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = example if isinstance(example, tuple) else () if kwargs else (example,)
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(x, Tensor) for x in leaves):
        raise ExampleError(
            f"example= is a {type(example).__name__} without a tensor; give an input (N, C, H, W), a tuple, or the "
            f"height and width of images"
        )

    def fake(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        # A batch of one breaks batch norm on 1 x 1 maps in train mode, and hides which tensors differ between images.
        shape = (2, *x.shape[1:]) if len(leaves) == 1 and x.ndim > 1 and x.shape[0] == 1 else x.shape
        return twin.make_tensor(shape, get_dtype(twin.model) if x.is_floating_point() else x.dtype)

    return Call(*tree_map(fake, (args, kwargs)))


def _propose_calls(twin: Twin, size: int | None) -> Iterator[Call]:
    """Propose inputs, the likeliest first; none for a network without convolutions."""
    if size is not None and size < 1:
        raise ExampleError(f"the input size is {size}; it must be at least 1")
    stem = next((m for m in twin.model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if stem is None:
        return
    config = getattr(twin.model, "pretrained_cfg", None) or getattr(twin.model, "default_cfg", None)
    known = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    num_dims = len(stem.kernel_size)
    sizes: list[tuple[int, ...]] = list(_USUAL_SIZES[num_dims])
    channels = [stem.in_channels]
    if known is not None:
        sizes.insert(0, tuple(known[1:]))
        channels.append(known[0])  # the first convolution sees more where a network folds space into channels
    if size is not None:
        sizes = [(size,) * num_dims]
        most = 2 * max(*channels, 3) * size**num_dims
        if most > MAX_NUMBERS:
            raise ExampleError(f"the input size is {size}, of which an input has {most:,} numbers; give a smaller one")
    num_inputs = _count_required(twin.model)
    for shape in dict.fromkeys(sizes):
        for num in dict.fromkeys((*channels, 3, 1)):
            image = twin.make_tensor((2, num, *shape), get_dtype(twin.model))
            yield Call((image,) * num_inputs, {})


def _count_required(model: nn.Module) -> int:
    """Count the arguments that a forward must be given; optical flow takes two images."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def describe_shapes(call: Call) -> str:
    """Name the shapes of a call's tensors."""
    leaves = tree_leaves((call.args, call.kwargs))
    return "shape " + ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor))


def find_running(
    model: nn.Module, calls: Iterable[Call], run: Callable[[Call], Result], *, hint: str
) -> tuple[Call, Result]:
    """Find the first call that a network runs on.

    Args:
        model: The network, for the message.
        calls: What to try.
        run: Runs it; whatever it raises means that it is another call.
        hint: What to do if there is none.

    Returns:
        The call, and what `run` gave.

    Raises:
        ExampleError: It runs on none; the message is the reason for the first.
    """
    failures: list[tuple[Call, Exception]] = []
    for call in calls:
        try:
            return call, run(call)
        except Exception as error:  # noqa: BLE001  the user's forward raises what it likes
            failures.append((call, error))
    if not failures:
        raise ExampleError(f"{type(model).__name__} has no convolution to tell its input channels; give example=")
    first, reason = failures[0]
    name, shapes = type(model).__name__, describe_shapes(first)
    raise ExampleError(f"{name} does not run on an input of {shapes}: {get_first_line(reason)}; {hint}") from reason
