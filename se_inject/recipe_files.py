"""Recipes as files that a person reads, copies and edits.

Takes the name of a recipe or a YAML file and overrides, gives a `Recipe`, or one error that lists all that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from se_inject.errors import RecipeError
from se_inject.recipe import Recipe
from se_inject.recipe_values import make_recipe

DEFAULT_RECIPE = "short"
_PACKAGE = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of YAML 1.2, which refuses a key that is given twice.

    YAML 1.1 takes 010 for 8, 1:30 for 90, and 1e-3 for a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(problem=f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def _set_number(kind: type[int] | type[float], pattern: str) -> None:
    """Let the loader read numbers of a kind where a pattern matches, and nowhere else."""

    def construct(_: _Loader, node: yaml.ScalarNode) -> float:
        return kind(node.value.replace(".inf", "inf").replace(".nan", "nan"))

    tag = f"tag:yaml.org,2002:{kind.__name__}"
    others = _Loader.yaml_implicit_resolvers.items()
    _Loader.yaml_implicit_resolvers = {first: [(t, p) for t, p in found if t != tag] for first, found in others}
    _Loader.add_implicit_resolver(tag, re.compile(pattern), [*"-+.0123456789"])
    _Loader.add_constructor(tag, construct)


_set_number(int, r"^[-+]?[0-9]+$")
_set_number(float, r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$")


def read_recipe(name: str = DEFAULT_RECIPE, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with overrides as in `lr=0.01`.

    Args:
        name: One of ours (`list_recipes`), or a YAML file.
        overrides: `KEY=VALUE` each, with the value written as in YAML.

    Raises:
        RecipeError: There is no such recipe, or keys and values of it are wrong; all are listed.

    Example:
        >>> read_recipe("short", ["lr=0.02"]).lr
        0.02
    """
    path = find_recipe(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  a safe one
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if values is None:
        raise RecipeError(f"the recipe {path} is empty; expected lines of KEY: VALUE")
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds a {type(values).__name__}; expected lines of KEY: VALUE")
    values = dict(values)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--set {override!r} has no =; expected KEY=VALUE")
            continue
        try:
            values[key.strip()] = yaml.load(text, _Loader)  # noqa: S506  a safe one
        except (yaml.YAMLError, ValueError):
            problems.append(f"{key.strip()} is {text!r}, which is no YAML value")
    return make_recipe(
        values, origin=" ".join([str(path), *(["with"] if overrides else []), *overrides]), problems=problems
    )


def list_recipes() -> dict[str, Path]:
    """List our recipes by name; they are found in a checkout and in an installed package."""
    folder = next((f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Find the file of a recipe.

    Raises:
        RecipeError: There is none.
    """
    own = list_recipes()
    path = Path(name)
    if name in own:
        return own[name]
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise RecipeError(f"there is no recipe {name!r}; expected {', '.join(own)}, or a .yaml file (copy one of ours)")
