"""Recipes for the paper's networks, and a run beside the reference figures."""

from dataclasses import replace
from pathlib import Path

import pytest
from torchvision import models
from typer.testing import CliRunner

from clado.config import load_config
from clado.errors import StoreError
from clado.records import CHOSEN, UNIFORM, Accuracy, Result, RunRecord
from clado.reference import MIB, REFERENCES, comparison
from clado.space import Assignment
from flows.cli import app

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "imagenet").glob("*.yaml"))
NETWORKS = ["mobilenet_v3_large", "regnet_x_3_2gf", "resnet34", "resnet50", "vit_b_16"]


def test_there_is_a_recipe_for_each_network() -> None:
    assert [recipe.stem for recipe in RECIPES] == NETWORKS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_parse_and_name_published_weights(recipe: Path) -> None:
    config = load_config(recipe)
    assert (config.network.name, config.activations.bits, config.corrections) == (recipe.stem, (8,), ())
    weights = models.get_model_weights(config.network.name)[config.network.weights_name or ""]
    assert Path(str(config.network.weights)).name == weights.url.rsplit("/")[-1]


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
    assert len(printed.splitlines()) == 11
    assert printed in plans
    assert [line.split()[0] for line in plans.splitlines()[::11]] == [f"torchvision:{network}" for network in NETWORKS]


def record(network: str = "torchvision:resnet18 with weights/resnet18-f37072fd.pth", num_images: int = 50_000) -> RunRecord:
    def result(method: str, bits: tuple[int, ...], mebibytes: float, top1: float) -> Result:
        return Result(
            f"{mebibytes} MiB",
            method,
            Assignment(bits),
            int(mebibytes * MIB),
            4.0,
            1.0,
            validation=Accuracy(num_images, 1.3, top1),
        )

    return RunRecord(
        network, ("a", "b"), (1, 1), "f", "cross_entropy", 1.0, Accuracy(num_images, 1.25, 0.6976),
        (result(CHOSEN, (4, 8), 7.9, 0.6870), result(UNIFORM, (4, 4), 5.32, 0.4700), result(CHOSEN, (2, 4), 4.0, 0.3)),
        imagenet=True,
    )  # fmt: skip


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row for row in cells}


def test_a_run_stands_beside_the_reference_rows_of_its_setting_or_size() -> None:
    text = comparison(record())
    rows = rows_of(text)
    assert rows["W4A8", "5.320"][4:] == ["uniform at 5.32 MiB, 5.320 MiB", "47.00", "1.3000", "+0.73"]
    assert rows["mixed, first and last float", "7.828"][4:] == ["chosen at 7.9 MiB, 7.900 MiB", "68.70", "1.3000", "+0.70"]
    assert rows["mixed, first and last float", "7.266"][4:] == ["–"] * 4
    assert rows["W8A8", "10.641"][4:] == ["–"] * 4
    assert len(rows) == 1 + sum(row.network == "resnet18" for row in REFERENCES)
    assert "says nothing" not in text
    assert "Reference: given, not measured here" in text


def test_a_part_of_imagenet_is_named_so_and_other_networks_are_refused() -> None:
    text = comparison(record(num_images=1000))
    assert "top1_subset %" in text
    assert "says nothing about the method" in text
    assert "says nothing" in comparison(replace(record(), imagenet=False))
    with pytest.raises(StoreError, match="no reference figures of resnet20_fashion_mnist; expected a run of one of resnet50"):
        comparison(record("zoo:resnet20_fashion_mnist"))
