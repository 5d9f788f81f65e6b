"""Programs: a network as bytes that run without its code.

Takes a network and a call, gives a program of torch.export or an ONNX model, and what runs the bytes. Knows nothing of
blocks and of files.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves

from se_inject.caches import kept_caches
from se_inject.calls import Call
from se_inject.errors import ExportError, get_first_line
from se_inject.files import PROGRAMS

TORCH, ONNX = PROGRAMS
INSTALL = "pip install 'se-inject[onnx]'"
_ONNX_LIMIT = 2**31 - 2**20
"""Bytes of tensors that one file can hold: protobuf's limit, less room for the graph."""
_SPATIAL = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
_LARGEST = 4096
"""Height or width of the largest images that a program is tried on."""
# They say what is in the errors too, and that an output is None.
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch.onnx._internal.exporter._core")


@dataclass(frozen=True)
class Program:
    """A network as bytes.

    Attributes:
        data: What a file holds.
        run: Runs it, with the arguments of the network.
        edges: By how many pixels the images of the call would have to be larger or smaller so as to lie just outside of
            what torch found the program to hold for, one size at a time. A file of ONNX does not keep what that is.
        is_read: Whether `run` is what was read from the bytes; without onnxruntime it is what they were made from.
    """

    data: bytes
    run: Callable[..., object]
    edges: tuple[tuple[int, ...], ...] = ()
    is_read: bool = True


def check_packages(suffix: str) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        ExportError: It is ONNX, and they are not there.
    """
    missing = [name for name in ("onnx", "onnxscript") if not _is_installed(name)]
    if suffix == ONNX and missing:
        raise ExportError(f"ONNX needs {' and '.join(missing)}, which cannot be found; run: {INSTALL}")


def check_size(model: nn.Module, suffix: str) -> None:
    """Refuse a network that is too large for a format.

    Raises:
        ExportError: It is ONNX, which holds 2 GB in one file.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if suffix == ONNX and size > _ONNX_LIMIT:
        raise ExportError(
            f"{type(model).__name__} has {size / 1e9:.1f} GB of weights, and one file of ONNX holds 2 GB; write .pt2, "
            f"or half of it (model.half())"
        )


@dataclass(frozen=True)
class Freedom:
    """Which dimensions of its inputs a program leaves open.

    Attributes:
        batch: The first one, which is the same for all inputs.
        size: The spatial ones, for all sizes that the network takes; some take multiples of 32 alone.
    """

    batch: bool = True
    size: bool = False

    def name(self, tensor: Tensor) -> dict[int, str]:
        """Name the open dimensions of an input."""
        spatial = _SPATIAL.get(tensor.ndim, ()) if self.size else ()
        return {**({0: "batch"} if self.batch else {}), **dict(enumerate(spatial, 2))}


def make_program(network: nn.Module, call: Call, suffix: str, freedom: Freedom) -> Program:
    """Export a network, and read back what is to be written.

    Args:
        network: In eval mode.
        call: Real tensors that it runs on. torch takes a size of 1 for a constant.
        suffix: `.pt2` or `.onnx`.
        freedom: Which dimensions are left open.

    Raises:
        Exception: Whatever torch raises where it cannot follow the network; see `explain_failure`.
    """
    with _hushed(), kept_caches(network):  # torch runs it over fake tensors
        exported = _export(network, call, freedom)
        edges = tuple(_find_edges(exported, list_tensors(call)))
        if suffix == TORCH:
            buffer = io.BytesIO()
            torch.export.save(exported, buffer)
            return Program(buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module(), edges)
        data = _serialize_onnx(exported, [freedom.name(tensor) for tensor in list_tensors(call)])
    is_read = _is_installed("onnxruntime")
    return Program(data, _open_onnx(data) if is_read else exported.module(), edges, is_read)


def list_tensors(call: Call) -> list[Tensor]:
    """List the tensors of a call."""
    return [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]


def explain_failure(error: BaseException) -> str:
    """Say in one line what is at the bottom of an error of torch's, without its advice to torch's developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return get_first_line(error).partition(" For more information")[0].rstrip("!")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _export(network: nn.Module, call: Call, freedom: Freedom) -> ExportedProgram:
    shapes, batch = ShapesCollection(), Dim("batch", min=1)  # type: ignore[no-untyped-call]
    for tensor in list_tensors(call):
        shapes[tensor] = {dim: Dim.DYNAMIC if dim else batch for dim in freedom.name(tensor)}
    is_open = freedom.batch or freedom.size
    exported = torch.export.export(network, call.args, call.kwargs, dynamic_shapes=shapes if is_open else None)
    _shorten_traces(exported)
    return exported


def _find_edges(exported: ExportedProgram, tensors: Sequence[Tensor]) -> Iterator[tuple[int, ...]]:
    """Find the sizes just outside of what a program holds for; from 2 on is all that torch ever says of a size."""
    names = set(exported.graph_signature.user_inputs)
    given = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    for tensor, fake in zip(tensors, (x for x in given if isinstance(x, Tensor)), strict=True):
        for place, size in enumerate(fake.shape[2:]):
            limits = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            ends: list[tuple[Any, int]] = [] if limits is None else [(limits.lower, -1), (limits.upper, 1)]
            for end, beyond in ends:
                if 2 < end <= _LARGEST:
                    yield (*[0] * place, int(end) + beyond - tensor.shape[2 + place])


def _shorten_traces(exported: ExportedProgram) -> None:
    """Name the files of the code that each operator came from as Python finds them, not by where they lie on this disk.

    Both formats keep these names, and a file that is handed on need not tell whose folder it was made in.
    """
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if text := node.meta.get("stack_trace"):
                node.meta["stack_trace"] = re.sub(r'(?<=File ")[^"]+', lambda found: _shorten(found[0]), text)


def _shorten(path: str) -> str:
    file = Path(path)
    if not file.is_absolute():
        return path
    folders = [folder for folder in map(Path.absolute, map(Path, sys.path)) if file.is_relative_to(folder)]
    return str(file.relative_to(max(folders, key=lambda folder: len(folder.parts), default=file.parent)))


def _serialize_onnx(exported: ExportedProgram, names: Sequence[Mapping[int, str]]) -> bytes:
    outputs = [name for name in exported.graph_signature.user_outputs if isinstance(name, str)]
    program = torch.onnx.export(
        exported,
        dynamo=True,
        output_names=["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))],
        dynamic_shapes=_name_once(names) if any(names) else None,  # the names alone
        verbose=False,
    )
    assert program is not None
    return cast("bytes", program.model_proto.SerializeToString())


def _name_once(names: Sequence[Mapping[int, str]]) -> tuple[dict[int, str] | None, ...]:
    """Give each open dimension's name where it comes first; torch finds those that are the same."""
    seen: set[str] = set()
    found: list[dict[int, str] | None] = []
    for open_dims in names:
        found.append({dim: name for dim, name in open_dims.items() if name not in seen} or None)
        seen.update(open_dims.values())
    return tuple(found)


def _open_onnx(data: bytes) -> Callable[..., list[Tensor]]:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = list_tensors(Call(args, kwargs))
        given = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep torch from printing graphs and logging; what matters of it is in its errors, which are reported once.

    With torch 2.9 the bytes of a file are warned of when they are read, and onnxscript prints what rules it applied.
    Weights that do not lie row by row are warned of when they are saved; whoever makes a program runs it afterwards.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
