"""Counts of the packages' source text: annotations, lengths, layer names, cycles of imports.

The tests of layering and of types count with these functions, and so does `house_figures.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TOPS = {"qdit_jax": "qdit_jax", "qdit_convert": "convert"}  # import name -> folder
# Layer names of families, as no other room may write them.
LAYER_NAMES = re.compile(
    r"blocks?_\d|\bblocks_|adaLN|qkv|\bfc[12]\b|\b[xty]_embedder\b|final_layer|embedding_table"
    r"|\bto_[qkv]\b|transformer_blocks"
)
KNOWS_LAYER_NAMES = {"models", "convert", "testing"}
SHOWN_TEXTS = re.compile(r"HELP|EPILOG|EXAMPLE")  # constants that only a person reads


def modules_under(root: Path) -> dict[str, Path]:
    """Returns all modules of the packages in a working tree, by their names."""
    found = {}
    for package, folder in TOPS.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


def room_of(module: str) -> str | None:
    """Returns the room of a module, `""` for the package's face and None for other packages."""
    package, _, rest = module.partition(".")
    if package == "qdit_convert":
        return "convert"
    return rest.split(".")[0] if package == "qdit_jax" else None


def top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when a module is imported (type checkers' imports do not)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from top_level(node)


def imported_modules(nodes: Iterator[ast.AST], modules: Mapping[str, Path]) -> set[str]:
    """Returns which of `modules` the nodes import; a room's name means its `__init__`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module or "")
    return found & set(modules)


def num_cycles(graph: Mapping[str, set[str]]) -> int:
    """Returns the number of groups of nodes that all reach each other."""
    names = sorted(set(graph).union(*graph.values()))
    number = {name: i for i, name in enumerate(names)}
    edges = np.array([(number[a], number[b]) for a in graph for b in graph[a]], int).reshape(-1, 2)
    ones = np.ones(len(edges), np.int8)
    matrix = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(len(names), len(names)))
    _, groups = connected_components(matrix, connection="strong")
    return int((np.bincount(groups) > 1).sum())


def cycles_of_files(modules: Mapping[str, Path]) -> int:
    """Returns the number of groups of files that import each other when they are loaded."""
    trees = {name: ast.parse(file.read_text()) for name, file in modules.items()}
    return num_cycles(
        {name: imported_modules(top_level(tree), modules) - {name} for name, tree in trees.items()}
    )


def cycles_of_rooms(modules: Mapping[str, Path]) -> int:
    """Returns the number of groups of rooms that import each other, inside functions too."""
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        room = room_of(name)
        if room not in (None, "", "__main__"):
            seen = imported_modules(ast.walk(ast.parse(file.read_text())), modules)
            rooms = {other for m in seen if (other := room_of(m))}
            graph.setdefault(room or "", set()).update(rooms - {room})
    return num_cycles(graph)


def read_strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yields the strings that code uses: all but docstrings and the texts for people."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and SHOWN_TEXTS.search(target.id)
            for target in node.targets
        ):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
        yield from read_strings(node)


def layer_names(source: str) -> list[tuple[int, str]]:
    """Returns line and text of each string in code that has a family's layer name in it."""
    found = read_strings(ast.parse(source))
    return [(node.lineno, node.value) for node in found if LAYER_NAMES.search(node.value)]


def functions(source: str) -> list[ast.FunctionDef]:
    """Returns every function of a module, inner ones and methods included."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def body_lines(function: ast.FunctionDef) -> int:
    """Returns the number of lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


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
