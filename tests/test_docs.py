"""Every Python block of the README and the docs runs, in order, page by page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvsieve
from kvsieve.geometry import STream3R
from kvsieve.scorer import SCORERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="session")
def stands_in(tmp_path_factory):
    """Folders that stand for models on a hub, so that the blocks run without a network. The published patch size
    matters to the geometry page; the bundled model has another."""
    folder = tmp_path_factory.mktemp("stream3r")
    STream3R(
        embed_dim=16, num_heads=2, depth=2, encoder_depth=1, camera_depth=1, camera_num_heads=2, dpt_features=8,
        dpt_out_channels=[8, 8, 8, 8], dpt_layers=[0, 0, 1, 1],
    ).save_pretrained(folder)  # fmt: skip
    return {"Qwen": kvsieve.zoo.path("mini-lm"), "STream3R": folder, "SmolVLM": kvsieve.zoo.path("mini-vlm")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page, tmp_path, monkeypatch, stands_in):
    monkeypatch.chdir(tmp_path)
    kvsieve.list_methods()
    known = dict(SCORERS)
    names = {"__name__": "__main__"}
    try:
        for block in BLOCK.findall(page.read_text()):
            code = re.sub(r'"(?:[\w-]+/)?(Qwen|STream3R|SmolVLM)[\w./-]*"', lambda m: repr(str(stands_in[m[1]])), block)
            exec(compile(code, str(page), "exec"), names)
    finally:
        SCORERS.clear()
        SCORERS.update(known)


def test_method_table_is_generated():
    from kvsieve.report.methods import methods_markdown

    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- methods: kvsieve methods --markdown -->\n")[1].split("<!-- /methods -->")[0]
    assert table.strip() == methods_markdown().strip()
