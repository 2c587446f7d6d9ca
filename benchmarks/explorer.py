"""How many answers a second the explorer gives while somebody drags the budget, in Chromium on this machine.

    python benchmarks/explorer.py

The network that is shipped, on an example of 256x512. The slider moves 40 times a second; each answer is about the
slider's place when it was asked, and no question waits behind another. OUTPUT also has what the network alone takes.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from routeseg.app import launch
from routeseg.evaluation import machine_facts
from routeseg.files import write_json
from routeseg.model import checkpoints

OUTPUT = Path("results/explorer_cpu.json")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
STATE = "document.querySelector('[data-ready]').routeseg"
MOVE = "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }"


def drag(page: Any, seconds: float, moves_per_second: float) -> dict[str, float]:
    """Drags the slider to and fro; what came of it."""
    slider, before, start = page.locator(".rs-range"), page.evaluate(f"{STATE}.answers"), time.perf_counter()
    network_ms, moves = [], 0
    while (now := time.perf_counter() - start) < seconds:
        slider.evaluate(MOVE, int(500 + 500 * np.sin(2 * np.pi * now / 3)))
        moves += 1
        network_ms.append(page.evaluate(f"{STATE}.view.ms"))
        time.sleep(max(0.0, moves / moves_per_second - (time.perf_counter() - start)))
    took = time.perf_counter() - start
    answers = page.evaluate(f"{STATE}.answers") - before
    page.wait_for_function(f"!{STATE}.busy && !{STATE}.stale")
    return {
        "moves": moves,
        "answers": answers,
        "answers_per_second": answers / took,
        "network_ms_median": float(np.median(network_ms)),
        "answers_after_the_last_move": page.evaluate(f"{STATE}.answers") - before - answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    from playwright.sync_api import sync_playwright

    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    app = launch(checkpoints.load(), wait=False)
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=browser_file, args=FLAGS)
        page = browser.new_page()
        page.goto(app.local_url)
        page.wait_for_selector("[data-ready=yes]", timeout=60_000)
        page.click("[data-example=mixed]")
        page.wait_for_selector(".rs-numbers dd", timeout=60_000)
        drag(page, 2, 40)  # warm up
        found = drag(page, args.seconds, 40)
        version = browser.version
        browser.close()
    app.close()
    write_json(args.output, {"size": [256, 512], **found, "chromium": version} | machine_facts())
    print(f"{found['answers_per_second']:.1f} answers a second, {found['network_ms_median']:.0f} ms in the network")


if __name__ == "__main__":
    main()
