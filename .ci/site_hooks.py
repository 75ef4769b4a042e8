"""What the site needs beyond `docs`: the pictures of `experiments`, and the methods in the navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "experiments" / "pictures"
# A link of a page to a file of the repository that is no page: on the site its name alone is left.
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+(?!docs/)[^)]*\)")
PICTURE = re.compile(r"\]\((?:\.\./)+experiments/pictures/([^)]+)\)")


def on_config(config: Any) -> Any:
    """Lists a page for every method below `All methods`."""
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"))
    names = [page.stem for page in pages if page.stem != "all"]
    for section in config.nav:
        for title, entries in section.items():
            if title == "Recipes and methods":
                entries.append({"The methods": [{n: f"methods/{n}.md"} for n in names]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures."""
    for path in sorted(PICTURES.glob("*.png")):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points pictures to their copies, and leaves the names of files that are not on the site."""
    up = "../" * page.file.src_uri.count("/")
    return OUTSIDE.sub(r"\1", PICTURE.sub(rf"]({up}pictures/\1)", markdown))
