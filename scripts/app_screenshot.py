"""Make docs/app.png, the page of `hybriddit app` as a browser shows it, from a distilled adapter of the demo's teacher:

hybriddit distill configs/distill/demo.yaml data.images=120 train.steps=150
python scripts/app_screenshot.py outputs/distill-demo
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from hybriddit.app import serving

SETTINGS = {"width": 64, "height": 64, "steps": 16, "max_sequence_length": 24}
PAGE = Path(__file__).parents[1] / "docs" / "app.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of an adapter of assets/demo-teacher, or of its distillation")
    parser.add_argument("--out", type=Path, default=PAGE, help="(default: %(default)s)")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium on this machine")
    with (
        serving("assets/demo-teacher", (options.adapter,), settings=SETTINGS, device="cpu") as address,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.fill("#prompt textarea", "the same boot left and right")
        page.fill("#seed input", "1001")
        for _ in range(2):  # the second time is the usual one
            page.click("#compare")
            page.wait_for_selector("#figures .near")
            page.wait_for_timeout(6000)
        page.mouse.click(5, 5)
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=options.out)
        browser.close()


if __name__ == "__main__":
    main()
