"""The page in a real browser; skipped where there is none. `KVSIEVE_CHROMIUM` names one that is not on the path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from kvsieve.cli import app

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=4000",
    "--disable-dev-shm-usage", "--single-process", "--no-zygote",
)  # fmt: skip
PROBE = """
<script>
addEventListener("load", () => {
  const slider = document.querySelector("input[type=range]");
  const before = document.querySelectorAll(".s0").length;
  slider.value = slider.min;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  setTimeout(() => {
    const broken = [...document.images].filter(one => !one.complete || !one.naturalWidth).length;
    const drawn = [...document.querySelectorAll("figure svg")].filter(one => one.getBoundingClientRect().width > 50);
    const after = document.querySelectorAll(".s0").length;
    document.body.dataset.probe = `svg ${drawn.length} broken ${broken} moved ${before !== after}`;
  }, 500);
});
</script>
"""


def _browser():
    return os.environ.get("KVSIEVE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.mark.skipif(_browser() is None, reason="no Chromium on this machine")
def test_the_page_opens_without_errors(tmp_path):
    words = ["ruler", "--lengths", "200", "--samples", "3", "--policy", "h2o", "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [_browser(), *FLAGS, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe is not None, done.stderr[-2000:]
    pictures, broken = map(int, re.findall(r"\d+", probe[1]))
    assert pictures >= 4
    assert broken == 0
    assert "moved true" in probe[1]
