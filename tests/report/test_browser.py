"""The page in a real browser; skipped where there is none. `KVSIEVE_CHROMIUM` names one that is not on the path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading

import pytest
from typer.testing import CliRunner

from kvsieve.cli import app

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)  # fmt: skip
PROBE = """
<script>
addEventListener("load", async () => {
  const slider = document.querySelector("input[type=range]");
  const pause = () => new Promise(go => setTimeout(go, 50));
  const shades = () => [...document.querySelectorAll("span")].map(one => one.className).join();
  for (let i = 0; i < 200 && slider.disabled; i++) await pause();
  const before = shades();
  slider.value = 0;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  for (let i = 0; i < 200 && shades() === before; i++) await pause();
  const broken = [...document.images].filter(one => !one.complete || !one.naturalWidth).length;
  const drawn = [...document.querySelectorAll("figure svg")].filter(one => one.getBoundingClientRect().width > 50);
  console.info(`PROBE svg ${drawn.length} broken ${broken} moved ${before !== shades()}`);
});
</script>
"""


def _browser():
    return os.environ.get("KVSIEVE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.mark.skipif(_browser() is None, reason="no Chromium on this machine")
def test_the_page_opens_without_errors(tmp_path):
    words = [
        "ruler",
        "--lengths",
        "200",
        "--samples",
        "3",
        "--policy",
        "h2o",
        "--chunk-size",
        "32",
        "--output",
        str(tmp_path / "out"),
    ]
    assert CliRunner().invoke(app, words).exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{PROBE}</body>"))
    said = _console(file.as_uri(), tmp_path / "profile")
    assert len(said) == 1, said  # the probe's own line, and nothing that went wrong
    pictures, broken = map(int, re.findall(r"(?:svg|broken) (\d+)", said[0]))
    assert pictures >= 4
    assert broken == 0
    assert "moved true" in said[0]


def _console(address, profile):
    """What a page says on the console, up to the probe's line; the browser is ended then, as some do not end."""
    command = [_browser(), *FLAGS, f"--user-data-dir={profile}", address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    lines = []
    try:
        for line in process.stderr:
            if "CONSOLE" in line:
                lines.append(line.split("CONSOLE", 1)[1].split('"', 1)[-1])
                if "PROBE" in line:
                    break
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stderr.close()
    return lines
