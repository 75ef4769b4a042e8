"""Which room may import which: dependencies run downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = {"errors", "files", "settings"}
# Room -> what it may import beside itself, `TOP` and third parties.
ALLOWED = {
    "quant": set(),
    "kernels": {"quant"},
    "models": {"quant", "kernels"},
    "diffusion": set(),
    "metrics": set(),
    "ptq": {"quant", "models"},
    "search": {"quant", "ptq"},
}


def imported_modules(file: Path) -> set[str]:
    """Returns the absolute names of all modules that `file` imports, functions' own included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("qdit_jax.")}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_lies_below(room):
    files = list((ROOT / "qdit_jax" / room).rglob("*.py"))
    assert files
    exported = {"ActSpec", "QTensor", "WeightSpec"}
    for file in files:
        rooms = rooms_of(imported_modules(file)) - exported
        forbidden = rooms - ALLOWED[room] - TOP - {room}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_torch_is_imported_nowhere():
    for folder in ("qdit_jax", "convert"):
        for file in (ROOT / folder).rglob("*.py"):
            torch = {n for n in imported_modules(file) if n.split(".")[0] in ("torch", "diffusers")}
            assert not torch, file


def test_importing_the_package_loads_no_torch_and_starts_no_backend():
    code = (
        "import sys, qdit_jax, qdit_convert, qdit_jax.cli\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "assert not {'torch', 'diffusers', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
