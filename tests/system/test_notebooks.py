"""The lessons run top to bottom on the shipped network, their claims asserted on the way; and the site builds."""

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


def test_the_site_builds_without_warnings_and_its_pages_lead_to_each_other(tmp_path):
    python("-m", "sphinx", "--fail-on-warning", "--quiet", "-c", "docs", ".", tmp_path)
    reference = tmp_path / "docs" / "reference"
    facade = (reference / "clado.html").read_text(encoding="utf-8")
    assert all(f'id="clado.{name}"' in facade for name in clado.__all__)
    readme = (tmp_path / "README.html").read_text(encoding="utf-8")
    for page in ("docs/method.html", "notebooks/1-why-pairs-matter.html", "docs/reference/clado.paper.html"):
        assert f'href="{page}"' in readme
        assert (tmp_path / page).is_file()
    moments = (reference / "clado.quantization.moments.html").read_text(encoding="utf-8")
    assert 'href="../../tests/benchmarks/OVERFITTING.html"' in moments
