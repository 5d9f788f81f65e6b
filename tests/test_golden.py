"""What earlier versions wrote is read: the golden files are written once a format version, and never again."""

import json
from pathlib import Path

import pytest
import torch

from se_inject import blocks, load, load_adapter
from se_inject.optimization import find_optimization
from se_inject.records import FORMAT_VERSION
from tests.golden.write import FOLDER, build, build_network, draw_images

EXPECTED = torch.tensor(json.loads((FOLDER / "outputs.json").read_text()))
NETWORKS = sorted(p.name for p in FOLDER.iterdir() if p.name.startswith(("artifact", "optimized")))
ADAPTERS = sorted(p.name for p in FOLDER.glob("adapter-*"))


def test_there_are_files_of_every_version():
    versions = {str(version) for version in range(1, FORMAT_VERSION + 1)}
    for kind, wanted in (("artifact", versions), ("optimized", versions), ("adapter", versions - {"1"})):
        for suffix in (".pt", ".safetensors"):
            assert {Path(p).stem.partition("-")[2] for p in FOLDER.glob(f"{kind}-*{suffix}")} == wanted


@pytest.mark.parametrize("name", NETWORKS)
def test_a_golden_network_gives_the_outputs_that_it_gave(name):
    model = load(FOLDER / name)
    assert (find_optimization(model) is not None) == name.startswith("optimized")
    with torch.no_grad():
        # Other versions of torch add in other orders.
        torch.testing.assert_close(model(draw_images()), EXPECTED, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("artifact")])
def test_a_golden_network_has_the_numbers_that_were_written(name):
    state = load(FOLDER / name).state_dict()
    expected = build().state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_golden_adapter_goes_onto_its_base(name):
    model = load_adapter(build_network(), FOLDER / name)
    own, expected = blocks(model), blocks(build())
    assert list(own) == list(expected)
    for path, block in expected.items():
        assert all(torch.equal(own[path].state_dict()[k], v) for k, v in block.state_dict().items())
