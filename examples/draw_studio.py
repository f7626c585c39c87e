"""Take the pictures of the studio that the documents show.

    python examples/draw_studio.py [FOLDER]    # docs/studio

It needs the extra `studio`, playwright and Chromium.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

TABS = {"infill": "independent tries", "edit": "tokens changed", "score": "bits per character"}
"""What a finished view shows, which appears when its tab is opened."""


def save(shown: Page, path: Path, **options: Any) -> None:
    """A picture of a page, in few colours."""
    shown.screenshot(path=path, animations="disabled", **options)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def take(page: Page, out: Path) -> None:
    def wait(*words: str) -> None:
        for text in (*words, "in all"):
            page.locator(".st-view:visible").get_by_text(text).first.wait_for()

    wait("--length 256")
    save(page, out / "write.png", scale="css")
    page.get_by_role("button", name="Watch passes").click()
    wait("--length 128")
    save(page, out / "passes.png", scale="css")
    for tab, words in TABS.items():
        page.get_by_role("tab", name=tab.capitalize(), exact=True).click()
        wait(words)
        save(page, out / f"{tab}.png", full_page=True, scale="css")


def main(folder: str = "docs/studio") -> None:
    command = [sys.executable, "-m", "tarflowlm", "studio", "--no-browser"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as studio,
        sync_playwright() as playwright,
    ):
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            view = {"width": 1280, "height": 800}
            page = browser.new_page(viewport=view, device_scale_factor=2, reduced_motion="reduce")
            url = studio.stdout.readline().strip() if studio.stdout else ""
            if not url:
                sys.exit("the studio has not started")
            page.goto(url)
            take(page, Path(folder))
            browser.close()
        finally:
            studio.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
