"""README keeps its word: its code runs, its commands exist, its map names what is there."""

import re
from pathlib import Path

import pytest
import torch
import typer

from clado.template import render
from flows.cli import app
from tests.networks import Residual, build, images, labels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


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


@pytest.mark.parametrize("guide", [path for path in PAGES if "```python" in path.read_text()], ids=lambda path: path.name)
def test_the_python_of_the_guides_runs_in_order_in_one_namespace(guide):
    text = guide.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"(<!-- not run:[^>]*-->\n+)?```python\n(.*?)```", text, flags=re.S))
    assert len(blocks) == text.count("```python")  # none is passed over for the way it is fenced
    ran = [block for block in blocks if not block[1]]
    assert any("assert " in block[2] for block in ran), "the blocks claim nothing"
    names: dict[str, object] = {}
    for block in ran:
        first = text[: block.start(2)].count("\n")
        exec(compile("\n" * first + block[2], str(guide), "exec"), names)


@pytest.mark.parametrize("guide", PAGES, ids=lambda path: path.name)
def test_a_guide_says_why_its_commands_do_not_run(guide):
    text = guide.read_text(encoding="utf-8")
    if re.search(r"^    (clado|make|pip) ", text, flags=re.M):
        assert "<!-- not run:" in text


def test_the_commands_of_the_readme_and_the_guides_are_the_commands_there_are():
    commands = set(typer.main.get_command(app).commands)
    written = "\n".join(re.findall(r"`clado [^`]*`|^    clado .*$", README + GUIDES, flags=re.M))
    named = set(re.findall(r"`?clado ([a-z]+)\b", written))
    assert named == commands


def test_the_map_or_a_guide_names_every_module_of_the_packages():
    tree = README.split("## The map")[1].split("\n## ")[0] + GUIDES
    for folder in ("clado", "flows"):
        for path in (ROOT / folder).iterdir():
            if path.suffix == ".py" and path.stem != "__init__":
                assert path.name in tree, path


def test_every_picture_and_file_of_the_readme_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_demo_is_what_init_writes():
    assert (ROOT / "demo.yaml").read_text(encoding="utf-8") == render()
