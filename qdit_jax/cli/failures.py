"""How the command line ends when something is wrong: one line, in the words of its options."""

from __future__ import annotations

import argparse
import json
import linecache
import re
import shlex
import sys
import traceback

from qdit_jax.cli.options import option_names
from qdit_jax.errors import UserError

REFUSED, BROKEN, INTERRUPTED = 2, 1, 130
OURS = ("qdit_jax", "qdit_convert")
# Keywords of library functions whose options have another name.
ALIASES = {
    "num_steps": "steps",
    "spacing": "steps",
    "num_tokens": "tokens",
    "num_generations": "generations",
    "pinned": "pin",
    "excluded": "exclude",
    "mode": "act_mode",
    "strategy": "method",
    "conditions": "embeds",
    "shape": "size",
    "recipe": "recipes",
}
# What a keyword's value is called on the command line.
VALUES = {
    ("guidance", "None"): "1",
    ("guidance_channels", "None"): "all",
    ("stats", "calibrate(...)"): "FILE, from `qdit calibrate`",
}
ADVICE = re.compile(r"\b(?:use|pass|give|set|out) $")
KEYWORD = re.compile(r"\b([a-z_]+)=('[^']*'|\"[^\"]*\"|[\w*/+-]+\(\.\.\.\)|[^\s,;:()]*[^\s,;:().])")


def exit_status(error: BaseException, args: argparse.Namespace) -> int:
    """Says on stderr (and to a reader of JSON) what went wrong; returns the exit status."""
    if args.debug:
        traceback.print_exception(error)
    text, status = sentence(error, args)
    print(f"qdit: {text}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text.removeprefix("error: ")}))
    return status


def sentence(error: BaseException, args: argparse.Namespace) -> tuple[str, int]:
    """Returns the line to print and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        resumes = getattr(args, "resumes", lambda args: False)(args)
        more = "; run the same command again to resume" if resumes else ""
        return f"interrupted{more}", INTERRUPTED
    if is_refusal(error):
        return f"error: {in_option_words(str(error), args)}", REFUSED
    first = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, MemoryError) or first.startswith("RESOURCE_EXHAUSTED"):
        return f"error: out of memory ({first}); try a smaller --batch-size", BROKEN
    hint = "" if args.debug else " (a bug? run again with --debug for the traceback)"
    return f"error: {type(error).__name__}: {first}{hint}", BROKEN


def is_refusal(error: BaseException) -> bool:
    """Returns whether an error was raised on purpose: by the system, or by a `raise` of ours.

    A `ValueError` that NumPy or JAX raises inside our code was not foreseen.
    """
    if isinstance(error, UserError | OSError):
        return True
    if not isinstance(error, ValueError | TypeError) or error.__traceback__ is None:
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    code = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
    return frame.f_globals.get("__name__", "").split(".")[0] in OURS and "raise " in code


def in_option_words(text: str, args: argparse.Namespace) -> str:
    """Returns a message of the library with its keywords as options: `steps=0` is `--steps 0`.

    A keyword is taken for an option of the verb if its value is the option's, if another mention
    of it in the message is, or if it is advice ("use guidance=None"). Others, such as settings
    inside a recipe file, stay as they are.
    """
    parser = getattr(args, "parser", None)
    if parser is None:
        return text
    names = option_names(parser)

    def option(keyword: str) -> str | None:
        return next((k for k in (keyword, ALIASES.get(keyword)) if k in names), None)

    given = {
        match[1]
        for match in KEYWORD.finditer(text)
        if (name := option(match[1])) and is_value(match[2], getattr(args, name, None))
    }

    def replaced(match: re.Match[str]) -> str:
        keyword, value = match[1], match[2]
        name = option(keyword)
        if name is None or (keyword not in given and not ADVICE.search(text[: match.start()])):
            return match[0]
        plain = VALUES.get((keyword, value))
        return f"{names[name]} {shlex.quote(unquoted(value)) if plain is None else plain}"

    return KEYWORD.sub(replaced, text)


def is_value(text: str, value: object) -> bool:
    """Returns whether `text` of a message shows an option's value, or one of a list's."""
    if isinstance(value, list | tuple):
        return any(is_value(text, entry) for entry in value)
    shown = {str(value), repr(value)}
    if isinstance(value, int | float):
        shown.add(str(float(value)))
    if isinstance(value, str) and "=" in value:  # PATTERN=SIZE
        shown.add(repr(value.rpartition("=")[0]))
    return text in shown or unquoted(text) in shown


def unquoted(text: str) -> str:
    return text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text
