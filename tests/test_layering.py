"""How the rooms lie: imports run downwards only, through a room's `__init__`, and nothing is loose."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from source_figures import (
    KNOWS_LAYER_NAMES,
    TOPS,
    body_lines,
    layer_names,
    modules_under,
    room_of,
    top_level,
)

ROOT = Path(__file__).resolve().parent.parent
LOOSE = {"__init__", "__main__", "errors", "memory", "testing", "types"}
EVERYWHERE = {"errors", "types"}  # any room may import them
# Room -> the rooms that it may import, beside itself and these; from the ground floor upwards.
ALLOWED = {
    "errors": set(),
    "types": set(),
    "memory": set(),
    "assets": set(),
    "files": set(),
    "processes": {"files"},
    "quant": set(),
    "diffusion": set(),
    "metrics": {"files"},
    "kernels": {"quant"},
    "models": {"quant", "kernels"},
    "testing": {"models"},
    "recipes": {"files", "quant", "models"},
    "checkpoint": {"files", "quant", "models", "recipes"},
    "convert": {"files", "quant", "diffusion", "models", "recipes", "checkpoint"},
    "sampling": {"files", "quant", "diffusion", "kernels", "models", "checkpoint"},
    "calibration": {
        *(
            "files",
            "processes",
            "quant",
            "diffusion",
            "models",
            "recipes",
            "checkpoint",
            "sampling",
        ),
    },
    "ptq": {"files", "quant", "models", "recipes", "checkpoint", "sampling", "calibration"},
    "methods": {
        *("files", "quant", "diffusion", "models", "recipes", "checkpoint", "calibration", "ptq"),
    },
    "allocation": {
        *("files", "processes", "quant", "diffusion", "metrics", "kernels", "models", "recipes"),
        *("checkpoint", "sampling", "calibration", "ptq", "methods"),
    },
    "text": {"files"},
    "adapters": {"quant", "kernels", "recipes", "calibration", "ptq"},
    "report": {"files", "quant", "models", "recipes", "checkpoint", "calibration"},
    "evaluation": {
        *("files", "quant", "diffusion", "metrics", "kernels", "models", "recipes", "checkpoint"),
        *("sampling", "calibration", "report", "processes"),
    },
    "speed": {
        *("files", "quant", "kernels", "models", "recipes", "checkpoint", "sampling", "ptq"),
        *("calibration", "allocation", "report"),
    },
    "demo": {
        *("files", "convert", "metrics", "models", "recipes", "checkpoint", "sampling"),
        *("calibration", "ptq", "methods", "evaluation"),
    },
    "cli": {
        *("files", "quant", "diffusion", "metrics", "kernels", "models", "recipes", "checkpoint"),
        *("convert", "sampling", "calibration", "ptq", "methods", "allocation", "report"),
        *("evaluation", "speed", "demo", "memory", "text", "processes"),
    },
}
MAX_FUNCTION, MAX_KERNEL, MAX_FILE = 60, 120, 400


@functools.cache
def modules() -> dict[str, Path]:
    """Returns all modules of the packages by their names."""
    return modules_under(ROOT)


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(nodes: Iterator[ast.AST], file: Path) -> Iterator[tuple[str, str | None]]:
    """Yields each import as a module's name and the name taken from it (None for the module)."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_room = whole in modules() and whole.count(".") == 1 and "convert" not in whole
                yield (whole, None) if is_room else (node.module or "", alias.name)


def imported_rooms(module: str, nodes: Iterator[ast.AST]) -> set[str]:
    rooms = {room_of(name) for name, _ in imports(nodes, modules()[module])}
    return {room for room in rooms if room} - {room_of(module)}


def modules_of(room: str) -> dict[str, Path]:
    return {name: file for name, file in modules().items() if room_of(name) == room}


def check_acyclic(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a cycle of imports: " + " -> ".join(error.args[1]))


def test_every_room_has_a_row():
    rooms = {room_of(name) for name in modules()} - {"", "__main__", None}
    assert rooms == set(ALLOWED)


def test_nothing_is_loose():
    found = {file.stem for file in (ROOT / "qdit_jax").glob("*.py")}
    assert found <= LOOSE, f"{sorted(found - LOOSE)}: give it a room"


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below(room):
    for name, file in modules_of(room).items():
        forbidden = imported_rooms(name, ast.walk(tree_of(file))) - ALLOWED[room] - EVERYWHERE
        assert not forbidden, f"{name} imports {sorted(forbidden)}"


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_is_allowed_no_more_than_it_needs(room):
    needed = set()
    for name, file in modules_of(room).items():
        needed |= imported_rooms(name, ast.walk(tree_of(file)))
    assert ALLOWED[room] <= needed, f"{room} does not need {sorted(ALLOWED[room] - needed)}"


def test_rooms_import_each_other_in_one_direction():
    check_acyclic(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_the_files_of_a_room_import_each_other_in_one_direction(room):
    graph: dict[str, set[str]] = {}
    for name, file in modules_of(room).items():
        graph[name] = set()
        for module, taken in imports(top_level(tree_of(file)), file):
            whole = f"{module}.{taken}"
            target = whole if whole in modules() else module
            if target in modules() and room_of(target) == room:
                graph[name].add(target)
    check_acyclic(graph)


@pytest.mark.parametrize("room", ALLOWED)
def test_what_a_room_lists_exists(room):
    module = import_module("qdit_convert" if room == "convert" else f"qdit_jax.{room}")
    listed = list(getattr(module, "__all__", ()))
    assert len(set(listed)) == len(listed)
    missing = [name for name in listed if not hasattr(module, name)]
    assert not missing, f"{room} lists {missing}, which it does not have"


def users() -> list[tuple[str | None, Path]]:
    """Returns the files that import rooms, with the room that each lies in (experiments: None)."""
    found: list[tuple[str | None, Path]] = [
        (room_of(name), file) for name, file in modules().items() if name != "qdit_jax"
    ]
    return [*found, *((None, file) for file in (ROOT / "experiments").rglob("*.py"))]


def names_of_rooms(tree: ast.AST, file: Path) -> dict[str, str]:
    """Returns what `file` calls the rooms that it imports whole: `{alias: room}`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name: a.name for a in node.names if a.name in TOPS}
        elif isinstance(node, ast.ImportFrom) and node.module == "qdit_jax":
            found |= {a.asname or a.name: f"qdit_jax.{a.name}" for a in node.names}
    return {alias: room_of(name) or "" for alias, name in found.items() if room_of(name) in ALLOWED}


def listed_by(room: str) -> set[str]:
    front = "qdit_convert" if room == "convert" else f"qdit_jax.{room}"
    return set(getattr(import_module(front), "__all__", ()))


def reached_past(room: str | None, file: Path) -> Iterator[str]:
    """Yields what `file` imports of another room that the room does not list."""
    for module, taken in imports(ast.walk(tree_of(file)), file):
        target = room_of(module)
        if not target or target == room or target in LOOSE:
            continue
        front = "qdit_convert" if target == "convert" else f"qdit_jax.{target}"
        if module != front:
            yield f"{module}.{taken}" if taken else module
        elif taken and taken not in listed_by(target):
            yield f"{module}.{taken}"
    whole = names_of_rooms(tree_of(file), file)
    for node in ast.walk(tree_of(file)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        target = whole.get(node.value.id)
        if not target or target == room or target in LOOSE or node.attr.startswith("__"):
            continue
        if node.attr not in listed_by(target):
            yield f"{target}.{node.attr}"


@pytest.mark.parametrize(
    ("room", "file"), users(), ids=[str(file.relative_to(ROOT)) for _, file in users()]
)
def test_a_room_is_entered_by_its_door(room, file):
    past = list(reached_past(room, file))
    assert not past, f"{file.relative_to(ROOT)} reaches past a room's __init__: {past}"


def test_torch_is_imported_nowhere_at_the_top():
    """But by the room that needs an extra, when it runs."""
    for name, file in modules().items():
        nodes = top_level(tree_of(file)) if room_of(name) == "text" else ast.walk(tree_of(file))
        names = {name.split(".")[0] for name, _ in imports(nodes, file)}
        assert not names & {"torch", "diffusers", "transformers"}, file


@pytest.mark.parametrize("room", [room for room in ALLOWED if room not in KNOWS_LAYER_NAMES])
def test_no_family_s_layer_name_stands_in(room):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text!r}"
        for file in modules_of(room).values()
        for line, text in layer_names(file.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", ALLOWED)
def test_files_and_functions_are_short(room):
    most = MAX_KERNEL if room == "kernels" else MAX_FUNCTION
    found = []
    for file in modules_of(room).values():
        place = str(file.relative_to(ROOT))
        if len(file.read_text().splitlines()) > MAX_FILE:
            found.append(place)
        functions = [n for n in ast.walk(tree_of(file)) if isinstance(n, ast.FunctionDef)]
        found += [f"{place}: {f.name}" for f in functions if body_lines(f) > most]
    assert not found, f"more than {MAX_FILE} lines, or {most} of a function: {found}"


def test_importing_the_package_loads_no_torch_and_starts_no_backend():
    code = (
        "import sys, qdit_jax, qdit_convert, qdit_jax.cli\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "assert not {'torch', 'diffusers', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Files of the command line that every verb shares; they may look at all that was parsed.
OF_EVERY_VERB = {"__init__", "failures", "output"}


def test_only_a_verb_itself_takes_what_was_parsed():
    for name, file in modules_of("cli").items():
        if file.stem in OF_EVERY_VERB:
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef) and node.name != "run":
                names = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
                assert "args" not in names, f"{name}.{node.name} takes the whole of `args`"
