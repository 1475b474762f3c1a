"""The page of a run in a real browser: it complains of nothing, asks for nothing, and its heat map zooms."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from clado.reporting import page
from docs.screenshots import HEIGHT, WIDTH, shoot_report
from tests.reporting.test_page import NASTY, make_run
from tests.synthetic import make_record
from tests.system.browser import browser

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
COLOURS = "document.getElementById('map').toDataURL()"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_complaint_or_request(scheme: str, tmp_path: Path) -> None:
    make_run(tmp_path, replace(make_record(), notes=(NASTY,)))
    address = page.write(tmp_path).as_uri()
    with browser(scheme) as opened:
        opened.page.on("dialog", lambda dialog: pytest.fail("a text of the record was run as a script"))
        opened.page.goto(address)
        whole = opened.page.evaluate(COLOURS)
        assert len(whole) > 20_000  # as PNG; a blank one has a tenth of it
        opened.page.click("#closer")
        assert opened.page.evaluate(COLOURS) != whole
        opened.page.dblclick("#map")
        assert opened.page.evaluate(COLOURS) == whole
        box = opened.page.locator("#map").bounding_box()
        assert box is not None
        opened.page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 4)
        assert "conv1 at 2 bits with fc at" in opened.page.inner_text("#told")
        opened.page.mouse.wheel(0, -400)
        opened.page.wait_for_function(f"before => ({COLOURS}) !== before", arg=whole)
        opened.page.select_option("#which", label="layerwise")
        assert opened.page.evaluate(COLOURS) != whole
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        too_wide = opened.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        assert not too_wide
        assert opened.complaints == []
        assert opened.requests == [address]


def test_its_head_is_what_the_documents_show(tmp_path: Path) -> None:
    """`python -m docs.screenshots RUN` draws docs/report.png in the same way."""
    make_run(tmp_path, make_record())
    page.write(tmp_path)
    shoot_report(tmp_path, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)
        assert len(picture.convert("RGB").getcolors(2**24)) > 50  # tiles, lines and text, not a blank page
