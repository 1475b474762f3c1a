"""README keeps its word: its code runs, its commands exist, its map names what is there."""

import re
from pathlib import Path

import torch
import typer

from clado.template import render
from flows.cli import app
from tests.networks import Residual, build, images, labels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names = {
        "model": build(Residual),
        "example_input": images(1),
        "data": torch.split(images(32), 8),
        "validation_data": [(images(20), labels(20))],
    }
    exec(code, names)
    assert names["solution"].status == "optimal"
    assert 0 <= names["report"].top1 <= 1


def test_the_commands_of_the_readme_are_the_commands_there_are():
    commands = set(typer.main.get_command(app).commands)
    named = set(re.findall(r"`?clado ([a-z]+)\b", "\n".join(re.findall(r"`clado [^`]*`|^    clado .*$", README, flags=re.M))))
    assert named == commands


def test_the_map_names_every_module_of_the_packages():
    tree = README.split("## The map")[1].split("\n## ")[0]
    for folder in ("clado", "flows"):
        for path in (ROOT / folder).iterdir():
            if path.suffix == ".py" and path.stem != "__init__":
                assert path.name in tree, path


def test_every_picture_and_file_of_the_readme_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_demo_is_what_init_writes():
    assert (ROOT / "demo.yaml").read_text(encoding="utf-8") == render()
