"""The page /docs as a person uses it: a real browser without a screen, driven by Playwright."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
)


def browser_path() -> str | None:
    """Debian's Chromium, or another by one of its names."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class DocsPage:
    """The page, and what the browser did on its account."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requested: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._note)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, url: str) -> None:
        """Opens `url` and waits until the operations are there."""
        self.page.goto(url)
        self.page.locator(".opblock").first.wait_for()

    def authorize(self, key: str) -> None:
        """The Authorize dialog, filled in."""
        self.page.locator(".auth-wrapper .btn.authorize").click()
        dialog = self.page.locator(".modal-ux")
        dialog.locator("input").first.fill(key)
        dialog.locator(".auth-btn-wrapper .btn.authorize").first.click()
        dialog.locator(".btn-done").first.click()

    def try_out(self, tag: str, operation_id: str) -> tuple[int, str]:
        """Try it out, Execute, with the example as it stands: the status and the body shown."""
        block = self.page.locator(f"#operations-{tag}-{operation_id}")
        block.locator(".opblock-summary-control").click()
        block.locator(".try-out__btn").click()
        block.locator("button.execute").click()
        answer = block.locator(".live-responses-table")
        answer.wait_for()
        status = _shown(answer.locator("tbody .response-col_status"))
        return int(re.match(r"\d+", status)[0]), _shown(answer.locator("tbody .highlight-code"))


def _shown(element: Locator) -> str:
    return element.first.inner_text().strip()


@contextmanager
def docs_page(executable: str, profile: Path) -> Iterator[DocsPage]:
    """A browser with a new profile in this folder; it ends with the block."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1280, "height": 1600},
        )
        try:
            yield DocsPage(context.pages[0])
        finally:
            context.close()
