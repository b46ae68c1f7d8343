"""Make the gallery's pictures: run the demo, write its report, photograph the report's sections.

    python docs/make_gallery.py [FOLDER]

takes two minutes on one core, and seconds when FOLDER (default: runs/gallery) has the runs already. It needs
the `playwright` package and an installed Chromium, in CHROMIUM or on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from holdfast import toy_suite, write_report
from holdfast.demo import WAYS, run_demo
from holdfast.progress import Progress
from holdfast.runner.attribute import attribute_to_folder
from holdfast.tasks.toy import SIZE, STREAM_TASKS, STREAM_TRAINING

PICTURES = Path(__file__).parent / "pictures"
# the section of the page, or a part of it, and the width of the window that it is photographed in
SECTIONS = {
    "results": ("#results", 900),
    "tasks": ("#tasks", 900),
    "matrix": ("#matrix", 1000),
    "weights": ("#weights .block", 1000),
    "units": ("#units", 900),
    "agreement": ("#agreement", 900),
    "faithfulness": ("#faithfulness", 700),
    "forgotten": ("#forgotten .run", 800),
    "moved": ("#moved", 900),
}
MARGIN = 16  # pixels around a section


def runs(folder: Path) -> list[Path]:
    """The demo's runs, and an attribution of what the first task's model needs, with the zeroing test."""
    with Progress() as progress:
        run_demo(folder, 0, progress)
        learned = folder / "attribution" / "tasks" / f"01-{STREAM_TASKS[0]}"
        prior = folder / "prior"
        if not prior.exists():
            (task,) = toy_suite(
                STREAM_TASKS[:1], size=SIZE, train_rows=STREAM_TRAINING.train_rows, test_rows=100
            )
            data = folder / "data" / task.name
            data.mkdir(parents=True, exist_ok=True)
            for name, rows in (("train", task.train), ("test", task.test)):
                lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows]
                (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            attribute_to_folder(
                model=str(learned / "model"),
                data=data,
                out=prior,
                importance="lrp",
                assignments=[],
                faithfulness=True,
                dtype="float32",
                seed=0,
                progress=progress,
                like=folder / "attribution",
            )
    return [*(folder / name for name in WAYS), prior]


def photograph(report: Path, browser: Any) -> None:
    """Write one picture a section."""
    for name, (place, width) in SECTIONS.items():
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready=true]")
        section = page.locator(place).first
        for closed in section.locator("details.lost").all()[:1]:
            closed.locator("summary").first.click()
        page.evaluate("scrollTo(0, 0)")  # a click may have scrolled, and a box is told from the window
        box = section.bounding_box()
        clip = {"x": box["x"] - MARGIN, "y": box["y"] - MARGIN}
        clip |= {side: box[side] + 2 * MARGIN for side in ("width", "height")}
        page.screenshot(path=PICTURES / f"{name}.png", clip=clip, full_page=True)
        page.close()


def main() -> None:
    """Make them all."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gallery")
    report = write_report(runs(folder), folder / "gallery.html", title="holdfast demo").resolve()
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sys.exit("no chromium found: install one (Debian: apt-get install chromium) or set CHROMIUM")
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--headless", "--no-sandbox"])
        photograph(report, browser)
        browser.close()


if __name__ == "__main__":
    main()
