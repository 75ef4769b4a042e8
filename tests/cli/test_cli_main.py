"""The command line around the verbs: quick help, options of every verb, JSON, failures, completion."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from importlib import import_module

import pytest

from qdit_jax.checkpoint import Checkpoint, save
from qdit_jax.cli import VERBS, failures, main, module_of, options, output
from qdit_jax.errors import UserError
from qdit_jax.testing import realistic_dit

LIGHT = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
from qdit_jax.cli import VERBS, main
main([])
for arguments in (["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0, (arguments, stop.code)
    else:
        raise AssertionError(arguments)
heavy = {"jax", "numpy", "flax", "matplotlib", "tqdm"} & set(sys.modules)
assert not heavy, heavy
assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 2.0
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("main")
    model, params = realistic_dit(0, hidden_size=32, depth=1, num_heads=2)
    save(base / "model", Checkpoint(model, params))
    return base / "model"


def test_help_of_everything_is_quick_and_imports_no_jax():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"usage: qdit {verb}" in done.stdout


def test_bare_qdit_prints_the_help_and_ends_well(capsys):
    assert main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for verb, text in VERBS.items():
        assert f"{verb} " in printed
        assert text in printed
    assert "qdit quantize xl2" in printed


def test_version_names_package_jax_and_python(capsys):
    import jax

    import qdit_jax

    for arguments in (["--version"], ["sample", "--version"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert f"qdit_jax {qdit_jax.__version__}, jax {jax.__version__}, python 3." in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_shared_options_and_examples(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    for option in ("--json", "--quiet", "--verbose", "--debug", "--version"):
        assert option in printed, option
    assert "example" in printed


def test_json_is_alone_on_stdout(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--recipe", "w4a8", "--method", "rtn", "--json"]
    arguments = ["quantize", str(model_folder), str(out), *options]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["out"] == str(out)
    assert found["num_layers"] == 4
    assert found["disk"]["after"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert "blocks_0/attn/qkv" in printed.err
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "exists already" in json.loads(printed.out)["error"]


def test_json_of_numpy_paths_and_numbers_that_json_lacks(capsys):
    import numpy as np

    with output.json_on_stdout(True) as show:
        print("a table")
        show({"a": np.float32(1), "b": np.arange(2), "c": float("inf"), 4: None})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"a": 1.0, "b": [0, 1], "c": None, "4": None}
    assert printed.err == "a table\n"


def verb_that_raises(monkeypatch, error):
    """Makes `qdit export` raise `error` once it runs."""
    from qdit_jax.cli import export

    def run(args):
        if callable(error):
            error()
        raise error

    monkeypatch.setattr(export, "run", run)
    return ["export", "a", "b"]


def numpy_speaks():
    import numpy as np

    np.zeros(3).reshape(2)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyError("x"), 1, "qdit: error: KeyError: 'x' (a bug? run again with --debug"),
        (numpy_speaks, 1, "qdit: error: ValueError: cannot reshape"),
        (lambda: int("x"), 1, "qdit: error: ValueError: invalid literal"),
        (UserError("b is bad; use c."), 2, "qdit: error: b is bad; use c."),
        (OSError("no such file"), 2, "qdit: error: no such file"),
        (MemoryError("of 1 TB"), 1, "qdit: error: out of memory (of 1 TB); try a smaller"),
        (KeyboardInterrupt(), 130, "qdit: interrupted"),
    ],
)
def test_a_failure_is_one_line(monkeypatch, capsys, error, status, line):
    assert main(verb_that_raises(monkeypatch, error)) == status
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1
    assert ("a bug?" in printed) == (status == 1 and not isinstance(error, MemoryError))


def test_debug_shows_the_traceback(monkeypatch, capsys):
    arguments = verb_that_raises(monkeypatch, KeyError("x"))
    assert main([*arguments, "--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "a bug?" not in printed
    assert printed.endswith("qdit: error: KeyError: 'x'\n")


def test_a_refusal_of_the_library_is_told_from_a_bug():
    from qdit_jax.recipes import Recipe

    with pytest.raises(ValueError, match="is not a preset") as caught:
        Recipe.preset("w4")
    assert failures.is_refusal(caught.value)
    with pytest.raises(ValueError, match="reshape") as caught:
        numpy_speaks()
    assert not failures.is_refusal(caught.value)


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("calibrate", "run the same command again to resume"),
        ("search", "run the same command again to resume"),
        ("evaluate", "run the same command again to resume"),
        ("quantize", ""),
        ("quantize --method brecq", "run the same command again to resume"),
        ("quantize --method brecq --dry-run", ""),
    ],
)
def test_an_interruption_says_whether_work_goes_on(monkeypatch, capsys, verb, more):

    def run(args):
        raise KeyboardInterrupt

    verb, *options = verb.split()
    monkeypatch.setattr(import_module(f"qdit_jax.cli.{verb}"), "run", run)
    given = {"evaluate": ["a"], "quantize": ["a", "b", "--recipe", "w4a8"]}
    assert main([verb, *given.get(verb, ["a", "b"]), *options]) == 130
    printed = capsys.readouterr().err.strip()
    assert printed == "qdit: interrupted" + (f"; {more}" if more else "")


def test_what_cannot_go_on_does_not_say_so():
    from qdit_jax.cli import parser_of

    arguments = ["evaluate", "--samples", "a"]
    args = parser_of(arguments).parse_args(arguments)
    assert not args.resumes(args)


def arguments_of(verb, *given):
    from qdit_jax.cli import parser_of

    arguments = [verb, *given]
    return parser_of(arguments).parse_args(arguments)


@pytest.mark.parametrize(
    ("given", "text", "expected"),
    [
        ([], "guidance=1.5 needs a null class; use guidance=None.",
         "--guidance 1.5 needs a null class; use --guidance 1."),
        (["--batch-size", "16"], "a batch of 16; use batch_size=10 or less.",
         "a batch of 16; use --batch-size 10 or less."),
        (["--steps", "2000"], "spacing='2000' asks for too many", "--steps 2000 asks for too many"),
        (["--numerics", "integer"], "numerics='integer' has no effect",
         "--numerics integer has no effect"),
        ([], "a has num_classes=10 and b num_classes=5", "a has num_classes=10 and b num_classes=5"),
        ([], "recipe.json, rule 0: seed=7 is odd", "recipe.json, rule 0: seed=7 is odd"),
        ([], "use guidance_channels=None for all.", "use --guidance-channels all for all."),
        (["--eta", "2"], "eta=2.0 is not supported", "--eta 2.0 is not supported"),
    ],
)  # fmt: skip
def test_messages_of_the_library_name_options(given, text, expected):
    args = arguments_of("sample", "ckpt", *given)
    assert failures.in_option_words(text, args) == expected


def test_messages_name_options_of_lists_and_aliases():
    args = arguments_of("search", "a", "b", "--exclude", "x", "--pin", "y.*=32", "--steps", "3")
    for text, expected in (
        ("excluded='x' matches no layer", "--exclude x matches no layer"),
        ("pinned='y.*' matches no layer", "--pin 'y.*' matches no layer"),
        ("num_steps=3 is odd", "--steps 3 is odd"),
        ("layers='z' matches no layer", "layers='z' matches no layer"),
    ):
        assert failures.in_option_words(text, args) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "a", "b", "--num-batches", "0"], "--num-batches: '0' is not supported; use a"),
        (["search", "a", "b", "--exclude", "("], "--exclude: '(' is not a regular expression"),
        (["search", "a", "b", "--pin", "(=3"], "--pin: '(' is not a regular expression"),
        (["search", "a", "b", "--pin", "x"], "--pin: 'x' cannot be read; write PATTERN=SIZE"),
        (["calibrate", "a", "b", "--hessians", "["], "--hessians: '[' is not a regular expression"),
        (["quantize", "a", "b", "--recipe", "w4a8", "--layers", "*"], "--layers: '*' is not a regular"),
        (["quantize", "a", "b", "--recipe", "w4a8", "--holdout", "1"], "--holdout: '1' is not"),
        (["sample", "a", "--columns", "0"], "--columns: '0' is not supported"),
        (["sample", "a", "--batch-size", "x"], "--batch-size: 'x' is not supported"),
        (["sample", "a", "--guidance", "nan"], "--guidance: 'nan' is not supported; use a finite"),
        (["sample", "a", "--guidance", "inf"], "--guidance: 'inf' is not supported"),
        (["sample", "a", "--clip", "0"], "--clip: '0' is not supported; use a number above 0"),
        (["sample", "a", "--guidance-channels", "0"], "--guidance-channels: '0' is neither a positive"),
        (["sample", "a", "--num-samples", "1e9"], "--num-samples: '1e9' is not supported"),
        (["evaluate", "a", "--num-samples", "1"], "use a whole number from 2"),
        (["evaluate", "a", "--range-samples", "-1"], "--range-samples: '-1' is not supported"),
        (["convert", "a", "b", "--num-heads", "0"], "--num-heads: '0' is not supported"),
        (["demo", "--num-samples", "9"], "use a whole number from 10"),
        (["inspect", "a", "--steps", "0"], "--steps: '0' is not supported"),
        (["sample"], "the following arguments are required: checkpoint"),
        (["paint"], "VERB: invalid choice: 'paint'"),
        (["sample", "a", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_its_option(capsys, arguments, message):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "--help`." in printed
    assert printed.startswith("qdit: error: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_no_number_is_taken_unchecked(verb):
    """Every option of a number has a type that refuses; only seeds are any whole number."""
    subparsers = options.Parser(prog="qdit").add_subparsers()
    import_module(module_of(verb)).add_parser(subparsers)
    for action in subparsers.choices[verb]._actions:
        assert action.type is not float, action.dest
        assert action.type is not int or action.dest == "seed", action.dest


def test_completion_knows_verbs_options_and_choices(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "qdit.bash"
    script.write_text(capsys.readouterr().out)
    for words, wanted in (
        ("qdit sam", "sample"),
        ("qdit sample --lab", "--labels"),
        ("qdit sample --sampler d", "ddim ddpm dpm-solver++"),
        ("qdit search --obj", "--objective"),
    ):
        code = (
            f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _qdit; "
            'echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted, words
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "note", "other"), [([], True, False), (["--quiet"], False, False),
                                 (["--verbose"], True, True)]
)  # fmt: skip
def test_notes_go_to_stderr_as_loud_as_asked(given, note, other, capsys):
    output.set_up_logging(arguments_of("sample", "a", *given))
    logging.getLogger("qdit_jax").info("going on")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("trouble")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("going on" in printed.err) == note
    assert ("chatter" in printed.err) == other
    assert "trouble" in printed.err


def test_quiet_and_verbose_exclude_each_other(capsys):
    assert main(["sample", "a", "--quiet", "--verbose"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_inert_options_are_named_with_their_value():
    args = argparse.Namespace(a_b=3, flag=True, words=["x", "y"])
    for name, default, text in (
        ("a_b", 2, "--a-b 3"), ("flag", False, "--flag"), ("words", [], "--words x y"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{text} has no effect: so it is.$"):
            options.refuse_inert(vars(args), {name: default}, "so it is")
    options.refuse_inert(vars(args), {"a_b": 3}, "so it is")
