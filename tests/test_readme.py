"""What the README and the pages of `docs` show runs as written, and what they link to exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.cli import VERBS, parser_of
from qdit_jax.recipes import Recipe
from qdit_jax.testing import realistic_dit

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINKED = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
# A fenced block; one right below this comment is a fragment.
NOT_RUN = "<!-- not run -->"
SHELL = {"|", "&&", ";", ">", "2>", "&"}
BLOCK = re.compile(rf"^({re.escape(NOT_RUN)}\n+)?```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    """Returns the blocks of `page` in `language` that are to run, in order."""
    found = BLOCK.finditer(page.read_text())
    return [match[3] for match in found if match[2] == language and match[1] is None]


def links(page):
    """Returns the relative targets of links and pictures, without their anchors."""
    text = BLOCK.sub("", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    config = {"hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 1000}
    model, params = realistic_dit(0, input_size=32, in_channels=4, **config)
    save(tmp_path / "xl2", Checkpoint(model, params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page):
    """Returns the names that the blocks of a page define, run one after another as one program."""
    names = {"__name__": page.stem}
    for number, code in enumerate(blocks(page, "python"), start=1):
        # As it stands: without what this file imports from `__future__`.
        program = compile(code, f"{page.name}, block {number}", "exec", dont_inherit=True)
        exec(program, names)
    return names


def test_the_python_example_runs(folder):
    assert len(blocks(README, "python")) == 1
    names = run(README)
    assert names["latents"].shape == (2, 32, 32, 4)
    assert load(folder / "xl2-w4a8").recipe == names["recipe"]


# These compute for more than a few seconds.
LONG = ("evaluation.md", "python.md", "recipes.md", "search.md", "speed.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.name, marks=pytest.mark.slow if p.name in LONG else ())
        for p in PAGES
        if blocks(p, "python")
    ],
)
def test_a_page_runs_as_one_program(page, folder):
    run(page)


def test_fragments_and_other_languages_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\none\n```\n\n```text\ntwo\n```\n\n" + NOT_RUN + "\n```python\nthree\n```\n"
        "[a](b.md#c) ![d](e.png) [f](https://g.h) [i](#j)\n```bash\n[k](l)\n```\n"
    )
    assert blocks(page, "python") == ["one\n"]
    assert links(page) == ["b.md", "e.png"]


def test_the_recipe_example_is_a_recipe(folder):
    (text,) = blocks(README, "json")
    recipe = Recipe.from_json(json.loads(text))
    assert len(recipe.resolve(load(folder / "xl2").params)) == 8 + 6


def test_every_command_is_a_verb_and_ci_runs_the_test_command():
    commands = [line for block in blocks(README, "bash") for line in block.splitlines()]
    verbs = {line.split()[1] for line in commands if line.startswith("qdit ")}
    assert verbs <= set(VERBS)
    assert len(verbs) >= 8
    (tests,) = (line for line in commands if "pytest" in line)
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def commands(text):
    """Returns the arguments of every `qdit` in lines of a shell."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        firsts = [i for i in range(len(words)) if i == 0 or words[i - 1] in SHELL]
        for start in (i for i in firsts if words[i] == "qdit"):
            end = next((i for i, w in enumerate(words) if i > start and w in SHELL), len(words))
            found.append(words[start + 1 : end])
    return found


def examples(verb):
    """Returns the lines of a verb's help that show it."""
    parser = parser_of([verb])
    (subparsers,) = (a for a in parser._actions if a.dest == "verb")
    shown = re.findall(r"^  (qdit (?:.*\\\n)*.*)$", subparsers.choices[verb].format_help(), re.M)
    return "\n".join(shown)


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_has_the_options_of_its_verb(page):
    for arguments in commands("".join(blocks(page, "bash"))):
        parser_of(arguments).parse_args(arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_a_verb_have_its_options(verb):
    for arguments in commands(examples(verb)):
        parser_of(arguments).parse_args(arguments)


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_picture_exists(page):
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"
