"""`--numerics`, and the name it had before."""

import argparse
import dataclasses
import logging
from importlib import import_module

import jax
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.cli.numerics_option import SLOW, note_if_slow

VERBS = {
    "sample": ["ckpt"],
    "evaluate": ["ckpt"],
    "verify": ["ckpt", "--against", "full"],
    "demo": [],
}


def parser_of(verb):
    parser = argparse.ArgumentParser()
    import_module(f"qdit_jax.cli.{verb}").add_parser(parser.add_subparsers())
    return parser


@pytest.mark.parametrize("verb", VERBS)
def test_the_earlier_name_still_works_and_says_its_present_one(verb, capsys):
    parser, given = parser_of(verb), [verb, *VERBS[verb]]
    assert parser.parse_args([*given, "--numerics", "integer"]).numerics == "integer"
    assert parser.parse_args(given).numerics in ("simulated", None)
    assert capsys.readouterr().err == ""
    assert parser.parse_args([*given, "--execution", "integer"]).numerics == "integer"
    assert capsys.readouterr().err == "qdit: note: --execution is called --numerics now.\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_present_name_only(verb, capsys):
    with pytest.raises(SystemExit):
        parser_of(verb).parse_args([verb, "--help"])
    printed = capsys.readouterr().out
    assert "--numerics {simulated,integer}" in printed
    assert "--execution" not in printed


@pytest.fixture(scope="module")
def checkpoints():
    """Returns a network in full precision, with quantized inputs, and with quantized weights alone."""
    full, found = tiny_checkpoint(in_channels=1), {}
    for name in ("w8a8", "w4a16"):
        recipe = qdit.Recipe.preset(name, full, group_size=16)
        params = qdit.quantize_params(full.params, recipe=recipe)
        found[name] = dataclasses.replace(full, params=params, recipe=recipe)
    return {"full": full, **found}


@pytest.mark.parametrize(
    ("backend", "names", "numerics", "is_told"),
    [
        ("gpu", ["full", "w8a8", "w8a8"], "simulated", True),
        ("tpu", ["w8a8"], "simulated", True),
        ("gpu", ["w8a8"], "integer", False),
        ("gpu", ["full", "w4a16"], "simulated", False),
        ("cpu", ["w8a8"], "simulated", False),
    ],
)
def test_simulated_numerics_are_said_to_be_slow(
    checkpoints, backend, names, numerics, is_told, monkeypatch, caplog
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with caplog.at_level(logging.INFO, "qdit_jax"):
        note_if_slow([checkpoints[name] for name in names], numerics)
    assert caplog.messages == [SLOW] * is_told


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("sample", ["sample", "CKPT", "--num-samples", "1", "--out", "OUT.npz"]),
        ("evaluate_models", ["evaluate", "CKPT", "--num-samples", "2", "--out", "OUT"]),
    ],
)
def test_verbs_that_sample_say_it(checkpoints, module, words, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(
        f"qdit_jax.cli.{module}.note_if_slow",
        lambda found, numerics: told.append(([one.recipe.name for one in found], numerics)),
    )
    path, out = str(tmp_path / "ckpt"), str(tmp_path / "out")
    qdit.save(path, checkpoints["w8a8"])
    words = [word.replace("CKPT", path).replace("OUT", out) for word in words]
    assert main([*words, "--steps", "2"]) == 0
    assert told == [(["w8a8-g16"], "simulated")]
