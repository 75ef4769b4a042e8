"""`--numerics`, and the name it had before."""

import argparse
from importlib import import_module

import pytest

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
