"""Text to train and to test on: novels from an archive, documentation from the running interpreter."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "__pycache__",
}
MIN_DOCSTRING = 80  # characters; shorter ones are mostly boilerplate
MIN_SHARED = 40  # a paragraph of at least this many characters that the reference also has is removed


def read_archive(path: Path) -> dict[str, str]:
    """The ``.txt`` files of a tar archive (any compression) by name, in name order."""
    texts: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            handle = archive.extractfile(member) if member.name.endswith(".txt") else None
            if handle is not None:
                texts[Path(member.name).stem] = handle.read().decode("utf-8")
    return texts


def language_reference() -> dict[str, str]:
    """The language reference that ships with Python: evaluation text, never trained on."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def _squeeze(text: str) -> str:
    """One space between words, so that wrapping does not hide equal paragraphs."""
    return " ".join(text.split())


def _source_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions, in source order."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def library_documentation(limit: int | None = None) -> tuple[list[str], int]:
    """Docstrings of the standard library without repeats, and how many paragraphs were removed.

    A paragraph that also occurs in the language reference is removed, since that is the evaluation text.
    Stops after ``limit`` docstrings.
    """
    reference = _squeeze("\n\n".join(language_reference().values()))
    seen: set[str] = set()
    removed = 0
    result: list[str] = []
    for path in _source_files():
        for docstring in _docstrings(path):
            paragraphs = []
            for paragraph in re.split(r"\n[ \t]*\n", docstring):
                plain = _squeeze(paragraph)
                if len(plain) >= MIN_SHARED and plain in reference:
                    removed += 1
                else:
                    paragraphs.append(paragraph.rstrip())
            text = "\n\n".join(paragraphs).strip()
            if len(text) >= MIN_DOCSTRING and text not in seen:
                seen.add(text)
                result.append(text)
                if len(result) == limit:
                    return result, removed
    return result, removed
