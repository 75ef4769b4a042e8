"""How many annotations say nothing: the share that is a bare `Any`."""

from pathlib import Path

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
