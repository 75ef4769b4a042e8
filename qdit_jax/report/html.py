"""Self-contained HTML pages: text, tables and pictures in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from qdit_jax.files import GENERATOR, PathLike, replaced_file

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9ea7b3; --line: #3d444d; --paper: #0d1117; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } caption { text-align: left; color: var(--soft); padding: .3rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; image-rendering: pixelated; }
figcaption { color: var(--soft); }
"""


def paragraph(text: str) -> str:
    """Returns a paragraph; the text is escaped."""
    return f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """Returns a section heading."""
    return f"<h2>{html.escape(text)}</h2>"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """Returns a table; every cell is shown as `str` of its value."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        joined = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{joined}</tr>"

    body = "".join(line("td", row) for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    whole = f"<table>{title}<thead>{line('th', headers)}</thead><tbody>{body}</tbody></table>"
    # On a narrow screen the table scrolls, not the page; by the keyboard too.
    return f'<div class="wide" tabindex="0" role="group">{whole}</div>'


def picture(image: Image.Image | Figure, caption: str) -> str:
    """Returns a figure with a Pillow image or a matplotlib figure inside, as PNG."""
    buffer = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(buffer, format="png", dpi=110)
    else:
        image.save(buffer, format="png")
    return embedded(buffer.getvalue(), "png", caption)


def animation(data: bytes, caption: str) -> str:
    """Returns a figure with a GIF inside."""
    return embedded(data, "gif", caption)


def embedded(data: bytes, kind: str, caption: str) -> str:
    encoded = base64.b64encode(data).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/{kind};base64,{encoded}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def write_report(path: PathLike, title: str, parts: Sequence[str]) -> None:
    """Writes one HTML page with the parts in order.

    Raises:
        UserError: if `path` holds anything but such a page.
    """
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )
    with replaced_file(path, "report") as temporary:
        temporary.write_text(page, encoding="utf-8")
