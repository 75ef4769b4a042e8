"""Every message on the page of error messages is one that the code still raises."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from test_readme import blocks

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "error-messages.md"
LEAST = 16  # letters that a template has of its own: `{}: {}` matches anything


def pattern(node: ast.expr) -> tuple[str, int]:
    """Returns a string's expression as a regular expression, and how many letters it fixes."""
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value)), len(str(node.value))
    assert isinstance(node, ast.JoinedStr)
    parts = [pattern(part) if isinstance(part, ast.Constant) else (".*", 0) for part in node.values]
    return "".join(text for text, _ in parts), sum(number for _, number in parts)


@cache
def templates() -> list[re.Pattern[str]]:
    """Returns the patterns of all strings in the source that are long enough to be a message."""
    found = set()
    for top in ("qdit_jax", "convert"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr) or (
                    isinstance(node, ast.Constant) and isinstance(node.value, str)
                ):
                    text, fixed = pattern(node)
                    if fixed >= LEAST:
                        found.add(text)
    return [re.compile(text, re.DOTALL) for text in found]


def is_of_the_code(message: str) -> bool:
    return any(template.fullmatch(message) for template in templates())


@pytest.mark.parametrize("message", [block.strip() for block in blocks(PAGE, "text")])
def test_the_code_still_says_so(message):
    # What stands before the sentence is added by the caller: a name of a file or an argument.
    assert is_of_the_code(message) or is_of_the_code(message.partition(": ")[2])


def test_another_message_is_not_of_the_code():
    assert not is_of_the_code("bits=9 is not supported; use 2 to 8, or 17 to leave it.")
    assert len(blocks(PAGE, "text")) >= 15
