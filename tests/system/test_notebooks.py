"""The lessons run top to bottom on the shipped network, their claims asserted on the way; and the API reference builds."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clado

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def python(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(1200)  # well under two minutes on two idle cores
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_top_to_bottom(path, tmp_path):
    copy = Path(shutil.copy(path, tmp_path))
    text = python(ROOT / "notebooks" / "execute.py", copy)
    assert re.fullmatch(rf"{path.name}: \d+ s\n", text)


def test_the_api_reference_builds_without_warnings(tmp_path):
    python("-W", "error", ROOT / "docs" / "reference.py", tmp_path)
    facade = (tmp_path / "clado.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in facade for name in clado.__all__)
    for page in ("index.html", "search.js", "clado/interaction.html", "clado/interaction/estimators/pairwise.html"):
        assert (tmp_path / page).is_file()
