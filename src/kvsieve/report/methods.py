"""The table of methods, read from the registry."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..policy import list_methods
from ..scorer import SCORERS, Scorer, StaticScorer
from .tables import markdown_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["KINDS", "methods_markdown", "methods_table"]

KINDS = (
    "Kinds: `none` evicts nothing; `static` scores a token once, when it arrives; `dynamic` scores what is held anew "
    "at every decision; `learned` asks a trained surrogate and takes a threshold."
)
_COLUMNS = ("method", "kind", "hyper-parameters", "source")


def methods_markdown() -> str:
    """A Markdown table of all methods and a line on the kinds."""
    rows = [[f"`{name}`", kind, f"`{hyper}`" if hyper else "", source] for name, kind, hyper, source in _rows()]
    return f"{markdown_table(_COLUMNS, rows)}\n\n{KINDS}\n"


def methods_table() -> Table:
    """The same for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Methods", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        table.add_column(name, no_wrap=name in ("method", "kind"), overflow="fold")
    for row in _rows():
        table.add_row(*(Text(cell) for cell in row))
    return table


def _rows() -> list[tuple[str, str, str, str]]:
    return [(name, _kind(SCORERS[name]), _hyper(SCORERS[name]), SCORERS[name].source) for name in list_methods()]


def _kind(method: type[Scorer]) -> str:
    if method.wants_hidden:
        return "learned"
    if method.name == "full":
        return "none"
    return "static" if issubclass(method, StaticScorer) else "dynamic"


def _hyper(method: type[Scorer]) -> str:
    return ", ".join(
        f"{f.name}={f.default!r}"
        for f in fields(method)
        if isinstance(f.default, (int, float, str)) or f.default is None
    )
