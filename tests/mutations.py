"""Changes to real files, drawn from a seeded generator: for `tests.fuzz`.

At three depths: the bytes; what is inside a container, whose checksums and lengths are made right again; and values and
tensors, with a digest that is right again.
"""

from __future__ import annotations

import copy
import io
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_inject.files import read_values, write_tensors
from se_inject.records import compute_digest

LEVELS = ("bytes", "inside", "values")
INTERESTING = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
WORDS = (
    "", "x", "__class__", "__init__", "os:system", "../..", "layer1.0", "layer1", "fc", "se", "se2", "forward", "model",
    "float16", "int64", "int4", "\n", '"', "'''", "\x00", "\u202e", "a" * 5000, "timm", "torchvision", "factory",
    "resnet18", "resnet34", "vgg11", "sigmoid", "tanh", "max", "mean", "eca", "cbam", "residual", "concat", "post",
    "pre", "separate", "hf-hub:a/b", "%n", "{}", "-1",
)  # fmt: skip


def change_bytes(data: bytes, rng: random.Random, span: tuple[int, int]) -> bytes:
    """Change some bytes; mostly within a span, where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        low, high = span if rng.random() < 0.7 else (0, len(changed))
        place = min(rng.randrange(low, max(low + 1, high)), len(changed) - 1)
        size = min(rng.choice((1, 2, 4, 8, 16, 64, 500)), len(changed) - place)
        number = struct.pack(rng.choice(("<q", ">q")), rng.choice(INTERESTING))[: rng.choice((1, 2, 4, 8))]
        piece = bytes(changed[place : place + size])
        old, new = rng.choice((
            (1, bytes([changed[place] ^ 1 << rng.randrange(8)])), (1, rng.randbytes(1)), (size, rng.randbytes(size)),
            (0, rng.randbytes(size)), (size, b""), (0, piece * rng.choice((1, 2, 50))), (size, bytes(size)),
            (len(number), number), (len(changed), b""),
        ))  # fmt: skip
        changed[place : place + old] = new
        if not changed:
            changed = bytearray(b"\x00")
    return bytes(changed)


def find_structure(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Find where a file says what it holds: a header, the pickle, or the archive's directory."""
    if data[:2] != b"PK":
        return 0, min(len(data), 8 + struct.unpack("<Q", data[:8])[0])
    if rng.random() < 0.5:
        return data.rindex(b"PK\x01\x02"), len(data)
    start = data.index(b"data.pkl")
    return start, start + 6000


def change_inside(data: bytes, rng: random.Random) -> bytes:
    """Change what a container holds, and make the container right again."""
    if data[:2] != b"PK":
        length = struct.unpack("<Q", data[:8])[0]
        text = change_bytes(data[8 : 8 + length], rng, (0, length))
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    out = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        chosen = rng.randrange(len(entries)) if rng.random() < 0.3 else 0
        for i, (name, content) in enumerate(entries):
            if i == chosen and rng.random() < 0.1:
                continue
            new = change_bytes(content, rng, (0, len(content))) if i == chosen and content else content
            archive.writestr(
                entries[rng.randrange(len(entries))][0] if i == chosen and rng.random() < 0.05 else name, new
            )
    return out.getvalue()


def change_value(value: Any, rng: random.Random) -> Any:
    """Change one value of a tree, somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        changed = dict(value)
        key = rng.choice(list(changed))
        kind = rng.random()
        if kind < 0.08:
            del changed[key]
        elif kind < 0.12:
            changed[draw_value(rng) if rng.random() < 0.2 else rng.choice(WORDS)] = changed[key]
        else:
            changed[key] = change_value(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        changed = list(value)
        place = rng.randrange(len(changed))
        kind = rng.random()
        if kind < 0.1:
            del changed[place]
        elif kind < 0.2:
            changed.insert(place, copy.deepcopy(changed[place]))
        elif kind < 0.3:
            rng.shuffle(changed)
        else:
            changed[place] = change_value(changed[place], rng)
        return changed
    if type(value) in (int, float) and rng.random() < 0.6:
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value * 1000, rng.choice(INTERESTING), float(value))
        )
    return draw_value(rng)


def draw_value(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((1, 5, 300))):
        deep = [deep] if rng.random() < 0.5 else {"x": deep}
    word = rng.choice(WORDS)
    plain = (None, True, 0, 1.5, float("nan"), float("inf"), 10**30, {}, [], rng.choice(INTERESTING))
    return rng.choice((*plain, deep, word, [word], {word: rng.choice(WORDS)}))


def change_tensors(tensors: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    changed = dict(tensors)
    name = rng.choice(list(changed))
    tensor = changed[name]
    makers: list[Callable[[], Any]] = [
        tensor.double, tensor.half, tensor.int, tensor.flatten, lambda: tensor[..., None],
        lambda: tensor.repeat((2,) + (1,) * (tensor.ndim - 1)) if tensor.ndim else tensor,
        lambda: tensor.new_zeros(0), lambda: tensor.t() if tensor.ndim == 2 else tensor, lambda: tensor * float("nan"),
        lambda: nn.Parameter(tensor.float()), lambda: draw_value(rng), lambda: tensor.new_zeros(1).expand(1 << 20),
        lambda: tensor.to(torch.complex64), lambda: tensor > 0,
    ]  # fmt: skip
    kind = rng.random()
    if kind < 0.15:
        del changed[name]
    elif kind < 0.3:
        changed[rng.choice(WORDS) + name] = changed.pop(name)
    elif kind < 0.4:
        changed[rng.choice(WORDS)] = torch.zeros(3)
    else:
        changed[name] = rng.choice(makers)()
    return changed


def change_values(path: Path, target: Path, rng: random.Random) -> None:
    """Change values or tensors of a file, and give it the digest that they have."""
    content = read_values(path, (".pt", ".safetensors", ".pth"))
    tensors = content.pop("state_dict", content)
    values = content if tensors is not content else {}
    for _ in range(rng.choice((1, 1, 2, 4))):
        if (rng.random() < 0.2 or not values) and tensors:
            tensors = change_tensors(tensors, rng)
        elif values:
            known = [
                key for key in ("plan", "plan", "plan", "source", "gains", "optimization", "base") if key in values
            ]
            part = rng.choice(known or list(values))
            values = {**values, part: change_value(values.get(part), rng)}
    if "digest" in values and rng.random() < 0.97:
        rest = {key: value for key, value in values.items() if key != "digest"}
        try:
            values["digest"] = compute_digest(tensors, rest)
        except (TypeError, ValueError, AttributeError, RecursionError):
            values["digest"] = "x"
    if target.suffix == ".safetensors":
        write_tensors(target, {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}, values)
    else:
        torch.save({**values, "state_dict": tensors} if values else tensors, target)


def make_file(folder: Path, seeds: list[Path], level: str, rng: random.Random) -> Path:
    """Write a changed file; one that cannot be written is drawn again."""
    while True:
        seed = rng.choice(seeds)
        target = folder / f"x{seed.suffix}"
        data = seed.read_bytes()
        if level == "values":
            try:
                change_values(seed, target, rng)
            except Exception:  # noqa: BLE001  what cannot be written is no file
                continue
        else:
            is_legacy = data[:2] != b"PK" and seed.suffix != ".safetensors"
            span = (0, min(3000, len(data))) if is_legacy else find_structure(data, rng)
            data = change_bytes(data, rng, span) if level == "bytes" or is_legacy else change_inside(data, rng)
            target.write_bytes(data)
        target.with_suffix(".kind").write_text(seed.name)
        return target
