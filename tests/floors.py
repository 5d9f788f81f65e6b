"""Print the oldest version of each package that pyproject.toml allows, and fail where another one is installed.

`make floors` asks it before the tests, so that a floor is what the tests ran with.
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def main() -> int:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for line in sorted({line for each in lists for line in each})]
    others = 0
    for requirement in requirements:
        if requirement.name == project["name"]:
            continue
        floor, found = next(iter(requirement.specifier)).version, version(requirement.name)
        differs = Version(floor) != Version(found)
        others += differs
        print(requirement.name, found, f"is not the floor, {floor}" if differs else "")
    return int(others > 0)


if __name__ == "__main__":
    sys.exit(main())
