"""Whatever happens while a file is written, the old one or the new one is there, whole."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from se_inject import load, save, save_adapter
from se_inject.checkpoints import CHECKPOINT, Checkpoint, write_checkpoint
from se_inject.deployment import deploy
from se_inject.errors import ArtifactError
from se_inject.files import write_whole
from tests import nets
from tests.faults import A, B, make_model, take_one

NETWORK = make_model(A)
WRITERS = {
    "x.pt": lambda path: save(NETWORK, path),
    "x.safetensors": lambda path: save(NETWORK, path),
    "a.pt": lambda path: save_adapter(NETWORK, path),
    "a.safetensors": lambda path: save_adapter(NETWORK, path),
    CHECKPOINT: lambda path: write_checkpoint(path.parent, Checkpoint(1, NETWORK.state_dict(), None, {}, {}, [], 0.0)),
    "x.pt2": lambda path: deploy(NETWORK, path),
    "x.onnx": lambda path: deploy(NETWORK, path),
}


@pytest.mark.slow
def test_two_hundred_killed_writers_leave_whole_files(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.faults", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    kinds = json.loads(found.stdout)
    assert sum(kind["kills"] for kind in kinds.values()) >= 200
    # Many were in the midst of it.
    assert sum(kind["parts left"] for kind in kinds.values()) >= 20
    assert sum(kind.get("old", 0) for kind in kinds.values()) >= 10
    assert sum(kind.get("new", 0) for kind in kinds.values()) >= 10


@pytest.fixture
def small_disk():
    """No file can be larger than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 500, 2000])
def test_a_full_disk_leaves_the_old_file(tmp_path, small_disk, name, size):
    path = tmp_path / name
    path.write_bytes(b"old")
    small_disk(size)
    with pytest.raises(ArtifactError, match=f"{name} cannot be written: File too large"):
        WRITERS[name](path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def locked(name, tmp_path):
    """A folder with files, in which this process has no right to write, root or not."""
    WRITERS[name](tmp_path / name)  # imports what it needs, which nobody but root might read
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for target in WRITERS:
            (folder / target).write_bytes(b"old")
        folder.chmod(0o555)
        if os.getuid() == 0:
            os.seteuid(65534)
        yield folder
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_without_rights_is_said_so(locked, name):
    denied = f"{name} cannot be written: (Permission denied|it is read-only|no right to write there)"
    with pytest.raises(ArtifactError, match=denied):
        WRITERS[name](locked / name)
    if name != CHECKPOINT:
        with pytest.raises(ArtifactError, match=denied):
            WRITERS[name](locked / f"new-{name}")
    assert (locked / name).read_bytes() == b"old"


def test_a_read_only_file_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # what it says to anybody but root
    with pytest.raises(ArtifactError, match="it is read-only"):
        write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to("real.pt")
    write_whole(tmp_path / "link.pt", lambda file: file.write(b"new"))
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").read_bytes() == b"new"


def test_what_killed_writers_left_is_removed_later(tmp_path):
    old, young, other = (tmp_path / name for name in (".x.pt.abc.part", ".x.pt.def.part", ".y.pt.abc.part"))
    for part in (old, young, other):
        part.write_bytes(b"half")
    for part in (old, other):
        os.utime(part, (time.time() - 7200,) * 2)
    write_whole(tmp_path / "x.pt", lambda file: file.write(b"whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, other.name, "x.pt"])


def write_often(path, value, enough):
    torch.set_num_threads(1)
    model = make_model(value)
    while not enough.is_set():
        save(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_two_writers_of_one_file_leave_it_whole(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save(NETWORK, path)
    context = multiprocessing.get_context("spawn")
    enough = context.Event()
    writers = [context.Process(target=write_often, args=(path, value, enough), daemon=True) for value in (A, B)]
    for writer in writers:
        writer.start()
    seen, num_changes, deadline = [A], 0, time.monotonic() + 300
    while num_changes < 40 and all(writer.is_alive() for writer in writers) and time.monotonic() < deadline:
        seen.append(take_one(list(load(path, base=nets.TwoBranches).parameters())))
        num_changes += seen[-1] != seen[-2]
    enough.set()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert num_changes == 40
    assert set(seen) == {A, B}
    assert list(tmp_path.iterdir()) == [path]
