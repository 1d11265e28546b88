"""Every Python block of the README and the docs runs, in order, page by page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvsieve
from kvsieve.scorer import SCORERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kvsieve.list_methods()
    known = dict(SCORERS)
    names = {"__name__": "__main__"}
    try:
        for block in BLOCK.findall(page.read_text()):
            # Names of models on a hub stand for the bundled one, so that this runs without a network.
            code = re.sub(r'"[\w.-]+/Qwen[\w.-]+"|"Qwen/[\w.-]+"', repr(str(kvsieve.zoo.path("mini-lm"))), block)
            exec(compile(code, str(page), "exec"), names)
    finally:
        SCORERS.clear()
        SCORERS.update(known)


def test_method_table_is_generated():
    from kvsieve.report.methods import methods_markdown

    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- methods: kvsieve methods --markdown -->\n")[1].split("<!-- /methods -->")[0]
    assert table.strip() == methods_markdown().strip()
