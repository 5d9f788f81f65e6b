import dataclasses

import pytest
import yaml

from se_inject.errors import RecipeError
from se_inject.recipe import Recipe
from se_inject.recipe_files import list_recipes, read_recipe
from se_inject.recipe_values import make_recipe


@pytest.mark.parametrize("name", ["short", "se_only", "full", "distill", "cifar"])
def test_our_recipes_are_found_and_read(name):
    assert isinstance(read_recipe(name), Recipe)


@pytest.mark.parametrize("path", list_recipes().values(), ids=list_recipes())
def test_each_recipe_says_what_it_does_and_names_every_setting(path):
    text = path.read_text()
    head = text.split("\n\n")[0]
    assert head.startswith("# ")
    assert f"se-inject finetune MODEL --data DIR --recipe {path.stem}" in head
    assert all(word in head for word in ("--set ", "Cost:", "Measured:"))
    assert set(yaml.safe_load(text)) == {field.name for field in dataclasses.fields(Recipe)}


def test_a_file_of_ones_own_is_read_and_overridden(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-3\nepochs: 2\nscale: [0.5, 1]\n")
    recipe = read_recipe(str(path), ["epochs=0.5", "lr=2e-3", "optimizer=adamw", "channels_last=false"])
    assert (recipe.lr, recipe.epochs, recipe.scale, recipe.optimizer) == (2e-3, 0.5, (0.5, 1.0), "adamw")
    assert not recipe.channels_last


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1\nlr: fast\nepochs: 0\nscale: [0.9, 0.1]\nbatch_size: 1.5\noptimizer: sdg\n")
    with pytest.raises(RecipeError) as error:
        read_recipe(str(path), ["ema=1", "smothing=0.1", "crop=random", "workers", "hflip=1.5", "channels_last=1"])
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert "\n" not in message
    for part in (
        "unknown key 'learning_rate'",
        "lr is 'fast'; expected a number",
        "epochs is 0.0; expected a number above 0",
        "scale is (0.9, 0.1); expected two numbers above 0, the smaller first",
        "batch_size is 1.5; expected a whole number",
        "optimizer is 'sdg'; expected auto or a name of timm.optim.list_optimizers() that takes first",
        "ema is 1.0; expected a number below 1",
        "unknown key 'smothing', did you mean smoothing?",
        "crop is 'random'; expected one of resized, padded, none",
        "--set 'workers' has no =; expected KEY=VALUE",
        "hflip is 1.5; expected a number from 0 to 1",
        "channels_last is 1; expected true or false",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "holds a list; expected lines of KEY: VALUE"),
        ("# nothing yet\n", "is empty; expected lines of KEY: VALUE"),
        ("a: [1\n", "cannot be read: while parsing"),
        ("lr: .nan\n", "lr is nan; expected a number"),
        ("lr: true\n", "lr is True; expected a number"),
        ("lr: -1\n", "lr is -1.0; expected a number of at least 0"),
        ("seed: null\n", "seed is None; expected a number"),
        ("lr: 1e300\n", r"lr is 1e\+300; expected a number of at most 1e\+38"),
        ("ratio: [1, 1e200]\n", r"ratio is \(1.0, 1e\+200\); expected numbers of at most 1e\+38"),
        ("epochs: 1e7\n", "epochs is 10000000.0; expected a number of at most 1,000,000"),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(path))


def test_what_was_overridden_is_named():
    with pytest.raises(RecipeError, match=r"short\.yaml with lr=-1 epochs=0: epochs is 0.0; .*; lr is -1"):
        read_recipe("short", ["lr=-1", "epochs=0"])


@pytest.mark.parametrize("name", ["shrot", "mine.yaml", "mine.json"])
def test_a_recipe_that_is_not_there_is_an_error_that_lists_ours(name):
    with pytest.raises(
        RecipeError, match=f"there is no recipe '{name}'; expected cifar, distill, full, se_only, short"
    ):
        read_recipe(name)


def test_values_go_into_a_file_and_back():
    recipe = read_recipe("short", ["scale=[0.2, 0.9]"])
    assert make_recipe(recipe.to_values()) == recipe


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("batch_size: 010\nlr: 1e-3\nse_lr: .5\nepochs: +1.\n")
    recipe = read_recipe(str(path), ["seed=08", "head_lr=2E-1"])
    read = (recipe.batch_size, recipe.lr, recipe.se_lr, recipe.epochs, recipe.seed, recipe.head_lr)
    assert read == (10, 0.001, 0.5, 1.0, 8, 0.2)
    for text in ("epochs=1:30", "epochs=0x10", "epochs=-.inf", f"seed={'1' * 5000}"):
        with pytest.raises(RecipeError, match=r"(expected a number|is no YAML value)$"):
            read_recipe("short", [text])


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 0.5\nepochs: 1\nlr: 0.001\n")
    with pytest.raises(RecipeError, match="mine.yaml cannot be read: lr is given twice$"):
        read_recipe(str(path))


def test_an_optimizer_may_be_written_as_its_class():
    assert read_recipe("short", ["optimizer=SGD"]).optimizer == "sgd"


def test_an_optimizer_of_second_order_is_refused():
    with pytest.raises(RecipeError, match="optimizer is 'adahessian'; expected .* that takes first derivatives alone"):
        read_recipe("short", ["optimizer=adahessian"])
