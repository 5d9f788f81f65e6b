"""Files that nobody made on purpose are read, or refused with one line; `tests.fuzz` runs many more of them."""

import copy
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from se_inject.claims import check_values
from se_inject.errors import SEInjectError
from se_inject.files import read_values
from se_inject.plan import Plan
from se_inject.provenance import Source
from tests.golden.write import FOLDER

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
CONTENT = read_values(FOLDER / "artifact-2.safetensors")
FIELDS = [*CONTENT["plan"], *(f"sites.{key}" for key in CONTENT["plan"]["sites"][0])]


def is_taken_well(read):
    """Tell whether something is read, or refused with one line that can be printed; whatever else it raises goes on."""
    try:
        read()
    except SEInjectError as error:
        return str(error).isprintable() and len(str(error)) < 700
    return True


@pytest.mark.slow
def test_changed_files_are_read_or_refused(tmp_path):
    """In a process of its own: what listens to the interpreter cannot be taken off again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--files", "500", "--jobs", "1", "--keep", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.stdout, found.stderr
    result = json.loads(found.stdout)
    assert result["violations"] == []
    assert result["files"] == 500
    outcomes = {key.partition(",")[2].strip() for key in result["counts"]}
    assert {"read", "refused: ArtifactError", "refused: SourceError"} <= outcomes


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300), suffix=st.sampled_from([".pt", ".safetensors"]), prefix=st.sampled_from([0, 4, 60])
)
def test_any_bytes_are_refused(tmp_path, data, suffix, prefix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes((FOLDER / f"artifact-2{suffix}").read_bytes()[:prefix] + data)
    assert is_taken_well(lambda: read_values(path))


@settings(deadline=None)
@given(field=st.sampled_from(FIELDS), value=TREE)
def test_any_value_in_a_plan_is_read_or_refused(field, value):
    values = copy.deepcopy(CONTENT["plan"])
    first, _, key = field.partition(".")
    if key:
        values["sites"][0][key] = value
    else:
        values[first] = value

    def read():
        plan = Plan.from_json(json.dumps(values))
        assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()

    assert is_taken_well(read)


def print_source(values):
    assert str(Source.from_values(values)).isprintable()


@given(values=TREE | st.fixed_dictionaries(dict.fromkeys(CONTENT["source"], TREE)))
def test_any_source_is_read_or_refused(values):
    assert is_taken_well(lambda: print_source(values))


def compare_values(value, path):
    assert json.dumps(check_values(value, path)) == json.dumps(value)


@given(value=TREE)
def test_plain_values_come_back_as_they_are(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "x.pt"
    assert is_taken_well(lambda: compare_values(value, path))
