"""How many annotations say nothing: the share that is a bare `Any`."""

import ast
import builtins
from pathlib import Path

import pytest
from source_figures import annotations, num_bare

PACKAGE = Path(__file__).parents[1] / "qdit_jax"
# What is left may be anything: leaves of pytrees, settings that are checked by hand.
MOST = 0.04


def test_a_bare_any_is_told_from_a_part_of_a_type():
    found = list(annotations("def f(a: Any, b: dict[str, Any], c) -> Any: ...\nd: Any = 1\n"))
    assert (num_bare(found), len(found)) == (3, 4)


def test_few_annotations_are_bare_any():
    found = [a for file in PACKAGE.rglob("*.py") for a in annotations(file.read_text())]
    share = num_bare(found) / len(found)
    assert share <= MOST, f"{share:.1%} of {len(found)} annotations are a bare Any"


def test_the_packages_ship_their_types():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE.parent / "convert" / "py.typed").is_file()


def names_of(tree):
    """Returns the names that a module uses, and those that it binds anywhere."""
    used, bound = set(), {*dir(builtins), "__file__"}
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.FunctionDef() | ast.ClassDef():
                bound.add(node.name)
            case ast.arg():
                bound.add(node.arg)
            case ast.ExceptHandler():
                bound.add(node.name)
            case ast.Name():
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
    return used, bound


@pytest.mark.parametrize("folder", ["qdit_jax", "convert", "experiments"])
def test_annotations_use_no_name_that_their_file_lacks(folder):
    # Annotations are not evaluated where shapes are not checked, and linters cannot tell shapes from names.
    lacking = {}
    for file in (PACKAGE.parent / folder).rglob("*.py"):
        used, bound = names_of(ast.parse(file.read_text()))
        if used - bound:
            lacking[str(file)] = used - bound
    assert lacking == {}


def test_a_name_that_is_lacking_is_found():
    used, bound = names_of(ast.parse("from a import b\ndef f(x: b, y: Lost[int]) -> f: ..."))
    assert used - bound == {"Lost"}
