"""Every page that a verb writes, opened in a real browser: narrow and wide, light and dark."""

from __future__ import annotations

import pytest
from browser import Browser, chromium

from qdit_jax import report
from qdit_jax.checkpoint import Checkpoint, save
from qdit_jax.cli import main
from qdit_jax.testing import realistic_dit

LEAST_CONTRAST = 4.5  # of WCAG 2.2 AA for text
PAGES = ("inspected", "compared", "digits", "text", "video")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium).")
    with Browser(program) as found:
        yield found


def check(browser, page, width, scheme):
    found = browser.look(page, width, scheme)
    assert found["problems"] == []
    assert found["overflow"] <= 0
    assert (found["without_alt"], found["broken"]) == (0, 0)
    assert found["least_contrast"][0] >= LEAST_CONTRAST, found["least_contrast"]
    assert (sum(found["paper"][:3]) < 3 * 128) == (scheme == "dark")
    return found


def test_it_sees_what_is_wrong(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><body style="background:#fff"><p style="color:#bbb">pale</p><img src="no.png">'
        '<div style="width:900px">wide</div><script>console.error("oh")</script>'
    )
    found = browser.look(page, 400, "light")
    assert found["overflow"] > 400
    assert (found["without_alt"], found["broken"]) == (1, 1)
    assert found["least_contrast"][0] < 2
    assert found["problems"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Returns the pages of inspect, evaluate and demo by name."""
    folder = tmp_path_factory.mktemp("pages")
    model, params = realistic_dit(0)
    save(folder / "full", Checkpoint(model, params))
    full, small = str(folder / "full"), str(folder / "small")
    assert main(["quantize", full, small, "--recipe", "w4a8-fast", "--method", "rtn"]) == 0
    assert main(["inspect", full, "--stats", "--out", str(folder / "inspected")]) == 0
    compared = ["--num-samples", "10", "--steps", "2", "--out", str(folder / "compared")]
    assert main(["evaluate", small, "--against", full, *compared]) == 0
    for model in ("digits", "text", "video"):
        assert main(["demo", "--quick", "--model", model, "--out", str(folder / model)]) == 0
    return {name: folder / name / "report.html" for name in PAGES}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable(browser, pages, name, width, scheme):
    found = check(browser, pages[name], width, scheme)
    assert found["pictures"] >= 1
    assert found["num_texts"] >= 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_long_words_and_wide_tables_do_not_widen_the_page(browser, tmp_path, scheme):
    word = "blocks_0/attn/" * 30
    parts = [
        report.heading(word),
        report.paragraph(word),
        report.table([f"column {i}" for i in range(20)], [range(20)], word),
    ]
    report.write_report(tmp_path / "page.html", word, parts)
    check(browser, tmp_path / "page.html", 400, scheme)
