"""A real headless Chromium that notes what a page complains of and asks for."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@dataclass
class Opened:
    """A page, and everything that its console said and that it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def browser(scheme: str = "light", width: int = 1200, height: int = 900) -> Iterator[Opened]:
    """A new page in Chromium. Without Chromium the test fails, because the page would not be tested."""
    if CHROMIUM is None:
        pytest.fail("no Chromium is installed; expected one, such as by: apt-get install chromium")
    with sync_playwright() as playwright:
        # as root, in a container, Chromium starts only without its sandbox; the pages are our own
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            opened = Opened(page)
            page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: opened.complaints.append(str(error)))
            page.on("request", lambda request: opened.requests.append(request.url))
            yield opened
        finally:
            chromium.close()
