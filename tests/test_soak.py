"""Many cycles in one process leave nothing behind: no memory, no modules, no lines of code, no files, no classes."""

import gc
import inspect
import linecache
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from se_inject import (
    blocks,
    eject,
    inject,
    load,
    load_adapter,
    optimize,
    save,
    save_adapter,
    set_adapter,
    standardize,
)  # fmt: skip
from tests import nets

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nets.conv(3, 8)
        self.conv2 = nets.conv(8, 8)

    def forward(self, x):
        x = self.conv(x)
        return x + self.conv2(x)


def read_memory():
    """Return the resident set of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def collect():
    for _ in range(3):  # a class goes before the one that it is derived from
        gc.collect()


def count_everything():
    collect()
    return {
        "objects": len(gc.get_objects()),
        "modules": len(sys.modules),
        "lines": len(linecache.cache),
        "classes": len(inspect.getmembers(sys.modules["se_inject.generated"])),
        "generated": sum(name.startswith("se_inject.generated.") for name in sys.modules),
        "derived": len(nets.TwoBranches.__subclasses__()) + len(Small.__subclasses__()),
    }


def run_cycle(folder):
    model = inject(Small(), example=EXAMPLE)
    save(model, folder / "model.pt")
    again = load(folder / "model.pt", base=Small)
    assert len(blocks(again)) == 1
    eject(again, inplace=True)


def repeat(cycle, folder, num):
    for i in range(num):
        cycle(folder)
        if i % 20 == 0:
            collect()  # what waits for Python's collector, which comes when it likes, is not what is left behind


def run_long_cycle(folder):
    model = inject(nets.TwoBranches(), example=EXAMPLE).eval()
    optimize(model)(EXAMPLE)
    standardize(model)(EXAMPLE)
    for name in ("one", "two"):
        save_adapter(model, folder / f"{name}.safetensors")
    network = eject(model)
    shared = load_adapter(network, folder / "one.safetensors", name="one")
    shared = load_adapter(shared, folder / "two.safetensors", name="two", inplace=True)
    set_adapter(shared, "one")
    shared(EXAMPLE)
    model.train()(EXAMPLE).sum().backward()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize(("cycle", "warm_up", "num"), [(run_cycle, 100, 500), (run_long_cycle, 10, 60)])
def test_cycles_leave_nothing_behind(cycle, warm_up, num, tmp_path, monkeypatch):
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    Path(tempfile.gettempdir()).mkdir()
    repeat(cycle, folder, warm_up)
    temporary = sorted(Path(tempfile.gettempdir()).iterdir())
    files, before, memory = sorted(folder.iterdir()), count_everything(), read_memory()
    repeat(cycle, folder, num)
    after, grown = count_everything(), read_memory() - memory
    assert after["objects"] - before["objects"] < num  # not one object a cycle
    del after["objects"], before["objects"]
    assert after == before
    assert grown < 8
    assert sorted(folder.iterdir()) == files
    assert sorted(Path(tempfile.gettempdir()).iterdir()) == temporary
    model = inject(nets.TwoBranches(), example=EXAMPLE)
    assert "self.se(" in inspect.getsource(type(model))


def make_network():
    class Local(nets.TwoBranches):
        pass

    return Local()


def list_generated():
    names = [*sys.modules, *(name.strip("<>") for name in linecache.cache)]
    return sorted(name for name in names if name.startswith("se_inject.generated."))


def test_a_generated_class_goes_with_its_last_network():
    collect()
    before = list_generated()
    model = inject(make_network(), example=EXAMPLE)
    copy = optimize(model)
    classes = [weakref.ref(cls) for cls in type(copy).__mro__[:3]]
    assert [reference().__name__ for reference in classes] == ["FastSELocal", "SELocal", "Local"]
    assert "self.se(" in inspect.getsource(type(model))
    assert len(list_generated()) == len(before) + 4
    del model, copy
    collect()
    assert [reference() for reference in classes] == [None, None, None]
    assert list_generated() == before


def test_the_same_code_gives_the_same_class_and_other_classes_of_its_name_their_own():
    one, two = (inject(nets.TwoBranches(), example=EXAMPLE) for _ in range(2))
    assert type(one) is type(two)
    left, right = (inject(make_network(), example=EXAMPLE) for _ in range(2))
    assert type(left) is not type(right)
    assert type(left).__module__ != type(right).__module__
    assert inspect.getsource(type(left)) == inspect.getsource(type(right))
    assert isinstance(left.se, nn.Module)


def test_what_is_replaced_while_tracing_does_not_stay_in_torchs_tables():
    script = (
        "import torch; from se_inject import inject; from tests import nets; "
        "inject(nets.TwoBranches(), example=torch.zeros(2, 3, 8, 8)); from torch import overrides; "
        "assert torch.is_grad_enabled in overrides.get_ignored_functions(); "
        "assert torch.relu in overrides.get_overridable_functions()[torch]"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
