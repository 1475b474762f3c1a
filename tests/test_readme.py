"""The documentation keeps its word: its code runs or says why not, its commands and files exist, the map names what is there."""

import ast
import re
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
import typer
import yaml

import clado
from clado.settings.loading import parse_config
from clado.settings.template import render
from flows.cli import app
from tests.networks import Residual, build, images, labels
from tests.synthetic import make_record

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES, ROOT / "infra" / "README.md", ROOT / "CONTRIBUTING.md"]
GUIDES_TEXT = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)
# a block, fenced or indented by four columns, and the reason above it if it does not run
BLOCK = re.compile(
    r"(?P<reason><!-- not run: [^>]+ -->\n+)?"
    r"(?:^```(?P<kind>\w*)\n(?P<fenced>.*?)^```$|(?<=\n\n)(?P<indented>(?:^ {4}[^\n]*\n)+))",
    flags=re.S | re.M,
)
PARSED = {"python", "yaml"}


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(path.read_text(encoding="utf-8")))


def given(path: Path) -> dict[str, object]:
    """What the code of a page finds: its reader's own network, data or run."""
    if path.name == "README.md":
        return {
            "model": build(Residual),
            "example_input": images(1),
            "data": torch.split(images(128), 32),
            "validation_data": [(images(20), labels(20))],
        }
    if path.name == "reading-the-results.md":
        make_record(num_layers=6).save(Path("run") / "record.json")
        return {"run": Path("run")}
    return {}


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_every_block_of_the_documentation_runs_or_says_why_not(path):
    text = path.read_text(encoding="utf-8")
    matches = blocks(path)
    assert text.count("```") == 2 * sum(block["kind"] is not None for block in matches)  # none is passed over for its fences
    for block in matches:
        line = text[: block.start()].count("\n") + 1
        assert block["kind"] in PARSED or block["reason"], f"{page(path)}:{line} neither runs nor says why not"


@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")], ids=page)
def test_the_python_of_a_page_runs_in_order_in_one_namespace(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = path.read_text(encoding="utf-8"), given(path)
    ran = [block for block in blocks(path) if block["kind"] == "python" and not block["reason"]]
    for block in ran:
        first = text[: block.start("fenced")].count("\n")
        exec(compile("\n" * first + block["fenced"], str(path), "exec"), names)
    if path.name == "README.md":
        assert "clado.compress(" in blocks(path)[0]["fenced"]  # the first thing that a reader can do
        assert names["result"].average_bits <= 3
        assert names["module"](images(2)).shape == (2, 4)
        assert names["solution"].status == "optimal"
        assert 0 <= names["report"].top1 <= 1
    else:
        assert any("assert " in block["fenced"] for block in ran), "the blocks claim nothing"


@pytest.mark.parametrize("path", [path for path in PAGES if "```yaml" in path.read_text(encoding="utf-8")], ids=page)
def test_the_settings_of_a_page_are_settings(path):
    required = {
        "network": {"source": "factory", "name": "my_network:make_network"},
        "data": {"source": "folder", "path": "FOLDER"},
    }
    for block in blocks(path):
        if block["kind"] == "yaml":
            written = yaml.safe_load(block["fenced"])
            assert set(written) <= parse_config({**required, **written}, page(path)).model_fields_set


def test_the_options_of_written_commands_are_options_there_are():
    commands = typer.main.get_command(app).commands
    written = [line for path in PAGES for block in blocks(path) for line in (block["indented"] or "").splitlines()]
    written += re.findall(r"`(clado [^`]+)`", "\n".join(path.read_text(encoding="utf-8") for path in PAGES))
    used = [
        (name, option)
        for line in written
        for name, rest in re.findall(r"\bclado ([a-z]+)\b([^#]*)", line)
        for option in re.findall(r"(?<!\S)--[a-z0-9-]+", rest)
        if name in commands
    ]
    assert len(used) > 10
    for name, option in used:
        assert option in {text for parameter in commands[name].params for text in parameter.opts}, f"clado {name} {option}"


def test_every_public_name_has_a_docstring():
    for name in clado.__all__:
        assert (getattr(clado, name).__doc__ or "").strip(), name


def test_every_field_of_a_dataclass_has_a_line_below_it():
    fields, silent = 0, []
    for file in sorted(file for package in ("clado", "flows") for file in (ROOT / package).rglob("*.py")):
        for owner in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(owner, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in owner.decorator_list):
                for field, below in zip_longest(owner.body, owner.body[1:]):
                    if isinstance(field, ast.AnnAssign):
                        fields += 1
                        said = isinstance(below, ast.Expr) and isinstance(getattr(below.value, "value", None), str)
                        silent += [] if said else [f"{page(file)}: {owner.name}.{ast.unparse(field.target)}"]
    assert fields > 400
    assert silent == []


def test_the_commands_of_the_readme_and_the_guides_are_the_commands_there_are():
    commands = set(typer.main.get_command(app).commands)
    written = "\n".join(re.findall(r"`clado [^`]*`|^    clado .*$", README + GUIDES_TEXT, flags=re.M))
    named = set(re.findall(r"`?clado ([a-z]+)\b", written))
    assert named == commands


def test_the_list_of_rooms_names_every_room_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The rooms")[1].split("\n## ")[0]
    for package, tree in zip(("clado", "flows"), text.split("    clado/\n")[1].split("    flows/\n"), strict=True):
        named = set(re.findall(r"^      ((?:[a-z_]+(?:/|\.py)(?:, )?)+)", tree, flags=re.M))
        rooms = {path.name + "/" * path.is_dir() for path in (ROOT / package).iterdir() if not path.name.startswith("_")}
        assert {name for line in named for name in line.split(", ")} == rooms


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_every_picture_and_file_that_a_page_links_is_there(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).is_file(), target


def test_the_readme_is_read_in_minutes():
    assert len(README.splitlines()) <= 150


def test_the_readme_links_every_guide_and_every_lesson():
    for path in [*GUIDES, *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        assert f"({page(path)})" in README, path


def test_the_demo_is_what_init_writes_and_shows_pairs_too():
    shown = (
        render().replace("[layerwise, gauss_newton]", "[layerwise, pairwise, gauss_newton]").replace("also pairwise, ", "also ")
    )
    assert (ROOT / "demo.yaml").read_text(encoding="utf-8") == shown != render()
