"""What of embedding prompts needs no torch: its refusals, and how a prompt is read and cleaned."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.cli.embed_text import PIPELINE_NAMES
from qdit_jax.text import PIPELINES, embedding, read_prompts


def test_the_command_names_every_pipeline():
    assert tuple(PIPELINES) == PIPELINE_NAMES


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "p.npz")]
    assert main(["embed-text", str(tmp_path / "model"), *given]) == 2
    text = capsys.readouterr().err
    assert "qdit embed-text needs torch and transformers" in text
    assert "pip install 'qdit-jax[text]'" in text


def test_the_room_loads_no_torch():
    code = (
        "import sys, qdit_jax.text\n"
        "assert not {'torch', 'transformers', 'jax'} & {m.split('.')[0] for m in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_of_prompts_has_one_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n two dogs \n")
    assert read_prompts(file) == ["a cat", " two dogs "]
    for text, message in (("", "holds no prompt"), ("a\n\nb\n", "line 2 is blank")):
        file.write_text(text)
        with pytest.raises(qdit.UserError, match=message):
            read_prompts(file)
    with pytest.raises(qdit.UserError, match="cannot be read as text"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_are_cleaned_as_their_pipelines_do():
    assert PIPELINES["pixart-alpha"].clean(" A Red Fox ") == "a red fox"
    assert PIPELINES["wan"].clean(" A &amp;amp; B\n C") == "A & B C"
    assert PIPELINES["sd3"].clean(" A Red Fox ") == " A Red Fox "
