"""Files from somebody who means harm: each is refused with one line, nothing runs, and little memory is taken."""

import io
import json
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from se_inject import load, load_adapter
from se_inject.artifact import get_source
from se_inject.errors import SEInjectError
from se_inject.files import read_state_dict
from se_inject.images import make_transform
from se_inject.plan import Plan
from se_inject.rewrite import get_plan
from tests.forgery import forge
from tests.golden.write import FOLDER, build_network

GIGABYTE = 1 << 30


@pytest.fixture
def target(tmp_path):
    """A whole artifact, to be changed."""
    path = tmp_path / "model.pt"
    path.write_bytes((FOLDER / "artifact-2.pt").read_bytes())
    return path


@pytest.fixture
def bounded():
    """A gigabyte more than now is all the memory that there is."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(read, match):
    """The message, which is one printable line."""
    with pytest.raises(SEInjectError, match=match) as info:
        read()
    line = str(info.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Write the entries of an archive anew, as `change` gives them by name."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries.update(change(entries))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def find(entries, end):
    return next(name for name in entries if name.endswith(end))


# Pickles


class Run:
    """Writes a file when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def canaries(path):
    import os
    import subprocess

    yield Run(os.system, f"touch {path}")
    yield Run(exec, f"open({str(path)!r}, 'w')")
    yield Run(eval, f"open({str(path)!r}, 'w')")
    yield Run(open, str(path), "w")
    yield Run(subprocess.check_output, ["touch", str(path)])
    yield Run(getattr, "text", "format")
    yield Run(torch.hub.load, "somebody/something", "net")
    yield Run(torch.load, "/etc/passwd")


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("place", ["alone", "plan", "state", "key", "attribute"])
def test_a_pickle_runs_nothing(target, tmp_path, number, place):
    canary = tmp_path / "canary"
    bomb = list(canaries(canary))[number]
    content = torch.load(target, weights_only=True)
    if place == "alone":
        content = bomb
    elif place == "plan":
        content["plan"]["note"] = bomb
    elif place == "state":
        content["state_dict"]["fc.weight"] = bomb
    elif place == "key":
        content[(bomb,)] = 1
    else:
        content["state_dict"]["fc.weight"].hidden = bomb
        content["state_dict"]["fc.weight"] = nn.Parameter(content["state_dict"]["fc.weight"])
        content["state_dict"]["fc.weight"].hidden = bomb
    torch.save(content, target)
    refused(lambda: load(target), "is not executed")
    refused(lambda: load_adapter(build_network(), target), "is not executed")
    refused(lambda: read_state_dict(target), "is not executed")
    target.write_bytes(pickle.dumps(bomb, protocol=2))
    refused(lambda: load(target), "is not executed|cannot be read")
    assert not canary.exists()


def test_attributes_that_hide_methods_change_nothing(target):
    content = torch.load(target, weights_only=True)
    weight = content["state_dict"]["fc.weight"]
    for name in ("numel", "cpu", "contiguous", "flatten", "clone", "view"):
        setattr(weight, name, "no method")
    torch.save(content, target)
    expected = load(FOLDER / "artifact-2.pt").state_dict()
    state = load(target).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_shared_values_are_no_billion_laughs(target):
    def laugh(content):
        laughs = ["ha"] * 10
        for _ in range(30):
            laughs = [laughs] * 10
        content["plan"]["calls"] = laughs

    content = torch.load(target, weights_only=True)
    laugh(content)
    torch.save(content, target)
    refused(lambda: load(target), "its values are too many, or nested too deeply")


@pytest.mark.parametrize("kind", [list, dict])
def test_values_that_hold_themselves_are_refused(target, kind):
    content = torch.load(target, weights_only=True)
    round_about = []
    content["plan"]["note"] = round_about if kind is list else {"deep": round_about}
    round_about.append(content["plan"]["note"])
    torch.save(content, target)
    refused(lambda: load(target), "nested too deeply")


def test_a_number_of_many_digits_is_refused(target):
    for key in ("version", "plan"):
        content = torch.load(FOLDER / "artifact-2.pt", weights_only=True)
        content[key] = 10**5000
        torch.save(content, target)
        refused(lambda: load(target), "has format version of type int|among its plain values|not executed")


@pytest.mark.parametrize("value", [1 << 64, 1j, b"x", {1: 2}, {1, 2}, torch.zeros(2), torch.float32, torch.Size([3])])
def test_what_is_no_plain_value_is_refused(target, value):
    content = torch.load(target, weights_only=True)
    content["plan"]["note"] = value
    torch.save(content, target)
    refused(lambda: load(target), "among its plain values|not executed|damaged")


# Archives


def test_a_compressed_archive_is_not_unpacked(target, bounded):
    rewrite(target, lambda e: {find(e, "data/0"): bytes(2 * GIGABYTE // 8)}, zipfile.ZIP_DEFLATED)
    assert target.stat().st_size < 1 << 20
    refused(lambda: load(target), "is compressed, which torch never does")
    refused(lambda: read_state_dict(target), "is compressed, which torch never does")


def test_overlapping_entries_are_refused(target):
    with zipfile.ZipFile(target) as archive:
        first, second = sorted(archive.infolist(), key=lambda e: e.header_offset)[1:3]
    data = bytearray(target.read_bytes())
    place = data.rindex(second.filename.encode()) - 46  # the central directory's record, whose offset is at 42
    struct.pack_into("<L", data, place + 42, first.header_offset)
    target.write_bytes(data)
    refused(lambda: load(target), "overlaps another one|cannot be read")


def test_two_entries_of_one_name_are_refused(target):
    with zipfile.ZipFile(target, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"x")
    refused(lambda: load(target), "two entries of its archive have the same name")


def test_entries_beyond_the_end_are_refused(target):
    data = bytearray(target.read_bytes())
    place = data.rindex(b"data/0") - 46
    place = data.rindex(b"PK\x01\x02", 0, place + 46)
    struct.pack_into("<LL", data, place + 20, 1 << 30, 1 << 30)
    target.write_bytes(data)
    refused(lambda: load(target), "reaches beyond the end of the file|overlaps|cannot be read")


def change_claim(path, before, after):
    rewrite(path, lambda e: {find(e, "data.pkl"): e[find(e, "data.pkl")].replace(before, after, 1)})


@pytest.mark.parametrize("version", [1, 2])
def test_a_tensor_larger_than_its_record_is_refused(tmp_path, bounded, version):
    path = tmp_path / "x.pt"
    values = {"format": "se-inject", "version": version, "source": None, "plan": {}, "digest": ""}
    torch.save({**values, "state_dict": {"x": torch.zeros(7)}}, path)
    whole = path.read_bytes()
    # numel of the storage; then also the tensor's own shape
    change_claim(path, b"K\x07t", b"J\x00\x00\x00\x10t")
    refused(lambda: load(path), "cannot be read|claims|damaged|no plan|does not say")
    change_claim(path, b"K\x07\x85", b"J\x00\x00\x00\x10\x85")
    refused(lambda: load(path), "cannot be read|claims")
    path.write_bytes(whole)
    change_claim(path, b"K\x07\x85", b"J\x00\x00\x00\x10\x85")
    refused(lambda: load(path), "cannot be read|claims")


def test_one_number_shown_a_billion_times_is_refused(target, bounded):
    content = torch.load(target, weights_only=True)
    content["state_dict"]["fc.weight"] = torch.zeros(1).expand(10**9)
    torch.save(content, target)
    refused(lambda: load(target), "'fc.weight' claims more numbers than the file has for it")


def test_a_file_shown_a_thousand_times_is_refused(target):
    content = torch.load(target, weights_only=True)
    large = torch.zeros(100_000)
    content["state_dict"].update({f"x{i}": large[i:] for i in range(2000)})
    torch.save(content, target)
    refused(lambda: load(target), "its tensors claim more numbers than it has")


@pytest.mark.parametrize("value", [
    torch.zeros(3, 16).to_sparse(), torch.zeros(3, 16, device="meta"), "x", None, [torch.zeros(3)],
    lambda: torch.quantize_per_tensor(torch.zeros(3, 16), 1.0, 0, torch.qint8),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_refused(target, value):
    content = torch.load(target, weights_only=True)
    content["state_dict"]["fc.weight"] = value() if callable(value) else value
    torch.save(content, target)
    refused(
        lambda: load(target), "among its tensors|is sparse, quantized or on another device|not executed|cannot be read"
    )


@pytest.mark.parametrize("value", [
    torch.zeros(3, 16, dtype=torch.int64), torch.zeros(3, 16, dtype=torch.bool),
    torch.zeros(3, 16, dtype=torch.complex64), torch.zeros(16, 3), torch.zeros(3, 16, 1), torch.zeros(0),
])  # fmt: skip
def test_a_tensor_of_another_shape_or_type_is_refused(target, value):
    forge(target, lambda content: content["state_dict"].update({"fc.weight": value}))
    refused(lambda: load(target), r"1 tensors differ in name, shape or type \(fc.weight")


@pytest.mark.parametrize("value", [torch.zeros(16, 3).t(), torch.zeros(1).expand(3, 16), torch.zeros(6, 32)[::2, ::2]])
def test_strides_do_not_matter(target, value):
    forge(
        target, lambda content: content["state_dict"].update({"fc.weight": value + 0 if 0 in value.stride() else value})
    )
    weight = load(target).fc.weight
    assert weight.is_contiguous()
    assert not weight.any()


# safetensors


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("data", [
    b"", b"\x00" * 7, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 90_000_000) + b"{}",
    struct.pack("<Q", 2) + b"{}", header(x=[]), header(x={"dtype": "F32"}), struct.pack("<Q", 2000) + b"[" * 2000,
    header(x={"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}) + bytes(4),
    header(x={"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 60]}) + bytes(4),
    header(x={"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}) + bytes(4),
    header(x={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + bytes(4),
    header(x={"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 4]}) + bytes(4),
    header(x={"dtype": "NONE", "shape": [1], "data_offsets": [0, 4]}) + bytes(4),
    header(x={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
           y={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(4),
    header(x={"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}) + bytes(12),
    header(__metadata__={"se_inject": 7}), header(__metadata__={"se_inject": "no json"}),
    header(__metadata__={"se_inject": "[1]"}), header(__metadata__={"se_inject": "7"}),
    header(__metadata__={"se_inject": "[" * 100_000}),
    header(__metadata__={"se_inject": '{"a":' * 1000 + "1" + "}" * 1000}),
    header(__metadata__={"se_inject": '{"format": "se-inject", "version": 1e999}'}),
    header(__metadata__={"se_inject": '{"format": "se-inject", "version": ' + "9" * 5000 + "}"}),
])  # fmt: skip
def test_a_lying_header_is_refused(tmp_path, bounded, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    refused(lambda: load(path), "cannot be read|is no artifact of se-inject|refused|reads up to 2")
    refused(
        lambda: load_adapter(build_network(), path), "cannot be read|is no adapter of se-inject|refused|reads up to 2"
    )


# Plans


HOSTILE = [
    "__class__", "__dict__", "__init__", "forward.__globals__", "../../etc/passwd", "..", "layer1/../..", "se'", 'se"',
    "se\nimport os", "se; import os", "se#", "se\\", '"""', "'''\nimport os\n'''", "se\x00",
    "\ud800", "se\u202e", "s\u0435",
    "a" * 100_000, "layer1.0.se.se", "_modules", "fc.weight", "%s%s%n", "{0.__class__}", "[red]x[/red]", "\x1b[31m",
]  # fmt: skip


@pytest.mark.parametrize("field", ["owner", "method", "name", "kind", "merge", "branches"])
def test_a_plan_reaches_nothing_but_the_network(target, field):
    whole = torch.load(target, weights_only=True)
    for text in HOSTILE:
        value = [text] if field == "branches" else text

        def change(content, value=value):
            content["plan"]["sites"][0][field] = value

        torch.save(whole, target)
        try:
            forge(target, change)
        except UnicodeEncodeError:
            continue  # not even torch can write it
        if field in ("merge", "branches") and text.isprintable():
            model = load(target)  # which are words for people, and become a comment
            assert torch.equal(model.fc.weight, whole["state_dict"]["fc.weight"])
            cls = next(type(m) for m in model.modules() if type(m).__name__ == "SEBasicBlock")
            assert "import os" not in [line.strip() for line in cls.__doc__.splitlines()[1:]]
        else:
            refused(lambda: load(target), "is of another network|not a plan|refused")


@pytest.mark.parametrize("values", [
    {"sites": 7}, {"sites": [7]}, {"sites": [{}]}, {"sites": {}}, {"passed_over": [None]}, {"calls": []}, {"calls": {}},
    {"calls": {":forward": {}}}, {"calls": {":forward": {"args": 3, "kwargs": {}}}}, {"divisor": 0},
    {"divisor": 1 << 40}, {"divisor": True}, {"bias": 1}, {"squeeze": "os"}, {"gate": []}, {"block": 7},
    {"block": "os:system"}, {"block": ""},
    {"block": "torch:load"}, {"block": "timm.layers:EcaModule"}, {"placement": None}, {"at": ["residual", 7]},
    {"model": ["x"]}, {"version": 99}, {"version": None}, {"version": -1e400}, {"other": 1},
])  # fmt: skip
def test_a_plan_of_other_things_is_refused(target, values):
    forge(target, lambda content: content["plan"].update(values))
    refused(lambda: load(target), "is of another network|not a plan|refused|give load|block is|the plan has version")


@pytest.mark.parametrize("site", [
    {"r": 1e-9}, {"r": 0}, {"r": -1}, {"r": float("nan")}, {"r": float("inf")}, {"r": "16"}, {"index": -1},
    {"index": 1 << 60}, {"index": True}, {"channels": 1 << 40}, {"hidden": 1 << 40}, {"num_parameters": 1 << 40},
    {"num_spatial": 0}, {"num_spatial": 9}, {"channel_dim": 0}, {"is_border": 1}, {"stage": "x"},
    {"name": "se2"}, {"name": 7}, {"owner": None}, {"owner": "fc"}, {"owner": "layer1.0.conv1"}, {"owner": "layer9"},
])  # fmt: skip
def test_a_site_of_other_numbers_is_refused(target, bounded, site):
    forge(target, lambda content: content["plan"]["sites"][0].update(site))
    refused(lambda: load(target), "is of another network|not a plan|refused")


@pytest.mark.parametrize("tensor", [
    {"tensor": [-1, 3, 8, 8], "dtype": "model"}, {"tensor": [1 << 40, 1 << 40], "dtype": "model"},
    {"tensor": [1, 3, 1 << 20, 1 << 20], "dtype": "model"}, {"tensor": "abc", "dtype": "model"},
    {"tensor": [1, 3, 8, 8], "dtype": "__class__"}, {"tensor": [1, 3, 8, 8], "dtype": "nn"}, {"tensor": [1, 3, 8, 8]},
    {"tensor": [1.5, 3], "dtype": "model"}, {"tensor": [1, 3, 8, 8], "dtype": "model", "channel_dim": "x"},
    {"list": 3}, {"tuple": {}}, {"dict": []}, {"exec": ["x"]}, {}, [], [[]], "text", 7, None,
])  # fmt: skip
def test_a_call_of_other_things_is_refused(target, bounded, tensor):
    for key in ("layer1.1:forward", ":forward"):
        forge(target, lambda content: content["plan"]["calls"][key].update(args=[tensor]))  # noqa: B023
    refused(lambda: load(target), "is of another network|not a plan|refused")


@pytest.mark.parametrize("name", ["\x00", "\u202e", "\x1b[2J", "a\nb"])
def test_an_argument_of_another_name_is_refused(target, name):
    target.write_bytes((FOLDER / "optimized-2.pt").read_bytes())
    forge(target, lambda content: content["optimization"].update(kwargs={name: 1}))
    refused(lambda: load(target), "is of another network: ResNet does not run on an input .* keyword argument")


def test_json_a_thousand_levels_deep_is_no_plan():
    for text in ("[" * 100_000, '{"version": 1, "sites": ' + "[" * 1000 + "]" * 1000 + ', "passed_over": []}'):
        refused(lambda: Plan.from_json(text), "not a plan of se-inject")  # noqa: B023


def test_a_site_that_stands_twice_is_refused(target):
    forge(target, lambda content: content["plan"]["sites"].append(content["plan"]["sites"][0]))
    refused(lambda: load(target), "two sites of one name|blocks would have")


# Sources


@pytest.mark.parametrize("source", [
    {"library": "factory", "name": "os:system", "options": {"command": "touch canary"}},
    {"library": "factory", "name": "canary:build"},
    {"library": "timm", "name": "os:system"}, {"library": "timm", "name": "__import__('os')"},
    {"library": "timm", "name": "hf-hub:somebody/something"}, {"library": "timm", "name": "local-dir:/tmp"},
    {"library": "torchvision", "name": "hf-hub:somebody/something"}, {"library": "torchvision", "name": "get_model"},
    {"library": "torchvision", "name": "resnet18", "options": {"weights": "DEFAULT"}},
    {"library": "torchvision", "name": "resnet18", "options": {"weights_backbone": "DEFAULT"}},
    {"options": {"pretrained": True}}, {"options": {"checkpoint_path": "evil.pth"}},
    {"options": {"pretrained_cfg": {"file": "evil.pth"}}}, {"options": {"cache_dir": "/tmp"}},
    {"options": {"num_classes": 10**9}}, {"options": {"num_classes": 10**30}}, {"options": {"channels": [1 << 20] * 4}},
    {"options": {"channels": "abcd"}}, {"options": {"num_classes": -1}}, {"options": {"num_classes": None}},
    {"options": {"act_layer": "os.system"}}, {"options": {"block": "os.system"}}, {"options": {"self": 1}},
    {"options": {"nothing": 1}}, {"options": {"\u202e": 1}}, {"options": {"__class__": 1}},
    {"options": {"layers": [10**9] * 4}},
    {"name": 7}, {"options": []}, {"classes": {}}, {"weights": None}, {"more": 1}, {"name": "\x1b[31mresnet18\n"},
])  # fmt: skip
def test_a_source_makes_nothing_happen(target, bounded, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary.py").write_text("open('canary', 'w')\n")
    torch.save({"x": Run(open, "canary", "w")}, tmp_path / "evil.pth")

    def change(content):
        options = source.get("options", {})
        merged = {**content["source"]["options"], **options} if isinstance(options, dict) else options
        content["source"] = {**content["source"], **source, "options": merged}

    forge(target, change)
    refused(
        lambda: load(target),
        "which is code|cannot be built|has no network|does not say|no file may choose|by what|another|plain values",
    )
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("preprocess", [
    {"library": "timm", "input_size": [3, 1 << 40, 1 << 40]}, {"library": "timm", "input_size": "x" * 9},
    {"library": "timm", "input_size": {}}, {"library": "timm", "mean": [[1]]}, {"library": "timm", "crop_pct": "x"},
    {"library": "timm", "nothing": 1}, {"library": "torchvision"}, {"library": "torchvision", "interpolation": "os"},
    {"library": "os", "x": 1}, {"library": []},
])  # fmt: skip
def test_preprocessing_of_other_things_is_refused(target, preprocess):
    forge(target, lambda content: content["source"].update(preprocess=preprocess))

    def read():
        model = load(target)
        make_transform(get_source(model), get_plan(model))

    refused(read, "preprocessing is none of its library's|how images become inputs")


def test_what_a_file_calls_things_does_not_reach_the_terminal(target):
    forge(target, lambda content: content["source"].update(weights="\x1b[2J", classes=["cat\r", "dog\u202e", "x"]))
    source = get_source(load(target))
    assert source.weights == "?[2J"
    assert source.classes == ("cat?", "dog?", "x")


# Adapters, and other people's state dicts


def test_an_adapter_of_other_things_changes_nothing(tmp_path):
    whole = torch.load(FOLDER / "adapter-2.pt", weights_only=True)
    path = tmp_path / "a.pt"
    network = build_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for values in ({"gains": {"fc": 2.0}}, {"gains": [1]}, {"base": 0}, {"plan": []}, {"state_dict": []},
                   {"state_dict": {}}, {"plan": {**whole["plan"], "divisor": 1 << 50}}):  # fmt: skip
        torch.save(whole, path)
        forge(path, lambda content: content.update(values))  # noqa: B023
        refused(lambda: load_adapter(network, path, inplace=True), "adapter|another network|plan|refused")
    assert type(network).__name__ == "ResNet"
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_a_legacy_file_is_read_within_its_size(tmp_path, bounded):
    state = nn.Linear(7, 3).state_dict()
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert all(torch.equal(read_state_dict(path)[key], value) for key, value in state.items())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"K\x15", b"J\x00\x00\x00\x7f", 1))
    refused(lambda: read_state_dict(path), "cannot be read")


def test_a_state_dict_of_views_is_read(tmp_path):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "x.safetensors")["weight"], torch.ones(2, 3))
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2, 3)}, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    assert torch.equal(read_state_dict(tmp_path / "x.pt")["x"], torch.ones(2, 3))
