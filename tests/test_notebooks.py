"""The committed lessons are what a reader sees: executed in order, with pictures, without errors, warnings or clutter.

tests/system/test_notebooks.py executes them again.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w/.:])(?:/\w+/|[A-Z]:\\)")  # the beginning of a path from a file system's root
MIMES = {"image/png", "text/html", "text/markdown", "text/plain"}


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def texts(value: object) -> Iterator[str]:
    """Every string of a notebook but its pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "image/png":
                yield from texts(item)


def test_a_path_is_seen():
    assert [text for text in texts({"a": ["see /srv/data/x", "C:\\data"], "image/png": "/a/"}) if ABSOLUTE.search(text)] == [
        "see /srv/data/x", "C:\\data",
    ]  # fmt: skip
    assert not ABSOLUTE.search("https://arxiv.org/abs/2307.05657, 3 / 4, bits/s")


def test_there_are_five_lessons():
    assert [path.name for path in LESSONS] == [
        "1-why-pairs-matter.ipynb", "2-reading-the-matrix.ipynb", "3-pareto.ipynb", "4-ten-lines.ipynb",
        "5-faster-on-a-cpu.ipynb",
    ]  # fmt: skip


def test_the_lesson_in_ten_lines_runs_and_has_them():
    """The others take minutes; tests/system runs them too, in a kernel."""
    first, *rest = code_cells(LESSONS[3])
    lines = [line for line in first["source"] if line.strip()]
    assert len(lines) <= 10
    names: dict[str, object] = {}
    for cell in (first, *rest):
        exec("".join(cell["source"]), names)  # asserts on its way
    assert names["module"] is names["result"].module


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
class TestLesson:
    def test_is_executed_in_order(self, path):
        cells = code_cells(path)
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

    def test_shows_pictures(self, path):
        assert sum("image/png" in output.get("data", {}) for output in outputs(path)) >= 3

    def test_claims_something(self, path):
        assert any("assert " in "".join(cell["source"]) for cell in code_cells(path))

    def test_shows_no_error_or_warning(self, path):
        for output in outputs(path):
            assert output["output_type"] in ("stream", "execute_result", "display_data")
            assert output.get("name", "stdout") == "stdout"
            assert set(output.get("data", {})) <= MIMES

    def test_is_small_and_says_nothing_of_a_machine(self, path):
        assert path.stat().st_size < 1_000_000
        paths = [text for text in texts(json.loads(path.read_text(encoding="utf-8"))) if ABSOLUTE.search(text)]
        assert paths == []
