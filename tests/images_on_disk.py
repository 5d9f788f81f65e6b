"""Folders of tiny images, for tests that read them."""

import json
import random
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def make_image(seed, size=(16, 16), mode="RGB", level=None):
    """Make a noisy image; `level` (0 to 1) sets its brightness, so that classes can be told apart."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    if level is not None:
        pixels = (pixels // 4 + round(190 * level)).astype(np.uint8)
    image = Image.fromarray(pixels)
    return image if mode == "RGB" else image.convert(mode)


def make_folder(path, classes=("cat", "dog"), num=4, size=(16, 16), mode="RGB", suffix=".png", seed=0):
    """Make `path/CLASS/0.png` and so on, `num` a class; classes differ in brightness. Gives the path."""
    path = Path(path)
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(num):
            number = random.Random(f"{seed} {name} {i}").getrandbits(32)
            image = make_image(number, size, mode, level=label / max(1, len(classes) - 1))
            image.save(path / name / f"{i}{suffix}")
    return path


def make_two_folders(path, classes=("cat", "dog"), num=4, num_val=2, **options):
    """Make `path/train/CLASS/` and `path/val/CLASS/`. Gives the path."""
    make_folder(Path(path) / "train", classes, num, seed=0, **options)
    make_folder(Path(path) / "val", classes, num_val, seed=1, **options)
    return Path(path)


def make_shards(path, split, labels, shard_lengths, size=(16, 16), broken=(), make=None):
    """Write webdataset's tar files of a split and note them in `_info.json`, as timm reads it. Gives the path.

    The images of the numbers in `broken` are cut off; `make` makes one by its number.
    """
    path = Path(path)
    path.mkdir(exist_ok=True, parents=True)
    names, number = [], 0
    for shard, length in enumerate(shard_lengths):
        names.append(f"{split}-{shard:02}.tar")
        with tarfile.open(path / names[-1], "w") as tar:
            for label in labels[number : number + length]:
                file = BytesIO()
                image = make_image(number + (1000 if split == "train" else 0), size) if make is None else make(number)
                image.save(file, "PNG")
                written = file.getvalue()[: 40 if number in broken else None]
                for suffix, content in (("png", written), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{split}{number:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
                number += 1
    info_file = path / "_info.json"
    values = json.loads(info_file.read_text()) if info_file.exists() else {"splits": {}}
    values["splits"][split] = {
        "name": split, "num_samples": number, "filenames": names, "shard_lengths": list(shard_lengths),
    }  # fmt: skip
    info_file.write_text(json.dumps(values))
    return path
