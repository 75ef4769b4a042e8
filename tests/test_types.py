"""How many annotations say nothing: the share that is a bare `Any`."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qdit_jax"
# The share when this was written was 0.184. Lower it with every room that names its types.
MOST = 0.19


def annotations(source: str) -> Iterator[ast.expr]:
    """Yields the annotation of every argument, result and field of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found = node.returns
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found = node.annotation
        else:
            continue
        if found is not None:
            yield found


def num_bare(found: list[ast.expr]) -> int:
    """Returns how many of the annotations are `Any` and nothing else."""
    return sum(isinstance(a, ast.Name) and a.id == "Any" for a in found)


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
