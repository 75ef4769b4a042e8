"""What verbs share: their parser, and option types whose error messages name the option."""

from __future__ import annotations

import argparse
import math
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from qdit_jax.errors import UserError

if TYPE_CHECKING:
    SubParsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:  # it takes no parameter when it runs
    SubParsers = argparse._SubParsersAction
# The `add_argument` of a parser or of a group.
AddArgument: TypeAlias = Callable[..., argparse.Action]

# More samples, steps or tries than these are taken for a typing error.
LARGEST_COUNT = 10_000_000
PATTERN_EXAMPLE = r"'blocks_\d+/mlp/.*'"
# Options of the verbs that share their work among several processes.
OF_PROCESSES = ("--coordinator", "--num-processes", "--process-id", "--distributed")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `UserError` of one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with the option's name first and where to read more."""
        if message.startswith("unrecognized arguments:"):
            words = [word.partition("=")[0] for word in message.split()]
            if given := next((word for word in words if word in OF_PROCESSES), None):
                raise UserError(one_process_text(given))
        text = re.sub(r"^argument ", "", message)
        raise UserError(f"{text.rstrip('.')}; see `{self.prog} --help`.")


def one_process_text(given: str, remedy: str = "") -> str:
    """Returns the refusal of several processes, `given` being what asks for them."""
    return (
        f"{given}: only calibrate, search, sample and evaluate share their work among processes{remedy}; "
        "start any other verb on one host, all of whose devices it uses."
    )


def present_source(text: str) -> str:
    """Returns a value of an option with `qdit-release` for its earlier name, `authors`, and says so.

    The earlier name goes in the next release.
    """
    if not text.startswith("authors"):
        return text
    present = text.replace("authors", "qdit-release", 1)
    print(f"qdit: note: {text} is called {present} now.", file=sys.stderr)
    return present


class VersionAction(argparse.Action):
    """Prints the versions of the package, JAX and Python, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: object) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, help="print versions, and exit"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_text())
        parser.exit()


def version_text() -> str:
    """Returns the versions of the package, JAX and Python, without importing JAX."""
    from importlib.metadata import PackageNotFoundError, version

    from qdit_jax import __version__

    try:
        jax = version("jax")
    except PackageNotFoundError:
        jax = "not installed"
    return f"qdit_jax {__version__}, jax {jax}, python {platform.python_version()}"


def verb_parser(
    subparsers: SubParsers, name: str, description: str, *, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Returns the parser of a verb with the options that every verb has.

    Description and epilog are shown as they are written, without wrapping.
    """
    from qdit_jax.cli import VERBS

    parser = subparsers.add_parser(
        name,
        help=VERBS.get(name),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )
    group = parser.add_argument_group("options of every verb")
    add = group.add_argument
    add(
        "--json",
        action="store_true",
        help="print one JSON object to stdout, everything else to stderr",
    )
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="show no progress and no notes")
    volume.add_argument(
        "--verbose", action="store_true", help="also show the log messages of other libraries"
    )
    add("--debug", action="store_true", help="show the traceback of a failure")
    add("--version", action=VersionAction)
    parser.set_defaults(parser=parser)
    return parser


def option_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Returns the long name of every option, by the name of its value."""
    return {
        action.dest: max(action.option_strings, key=len)
        for action in parser._actions
        if action.option_strings and action.help != argparse.SUPPRESS  # not an earlier name
    }


def whole_number(least: int, most: int = LARGEST_COUNT) -> Callable[[str], int]:
    """Returns the type of a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not supported; use a whole number from {least} to {most:,}"
            )
        return value

    return parse


positive_int = whole_number(1)
count = whole_number(0)


def seed_number(text: str) -> int:
    """Returns the seed that `text` gives; raises argparse's error if it is not a seed."""
    from qdit_jax.sampling import check_seed

    try:
        return check_seed(int(text))
    except ValueError as error:
        reason = str(error) if text.strip().lstrip("+-").isdecimal() else "is not a whole number"
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}") from error


def finite_float(text: str) -> float:
    """Returns a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; use a finite number")
    return value


def positive_float(text: str) -> float:
    """Returns a finite number above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; use a number above 0")
    return value


def share(text: str) -> float:
    """Returns a number from 0 to just below 1."""
    value = finite_float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; use 0 or more, below 1")
    return value


def pattern(text: str) -> str:
    """Returns a regular expression of layer paths, as it was written."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}; quote it for the shell, as in "
            + PATTERN_EXAMPLE
        ) from None
    return text


def guidance_channels(text: str) -> int | str:
    """Returns a count of channels, `all`, or `published`: as many as the family's own sampler."""
    if text in ("all", "published"):
        return text
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a positive number nor 'all'"
        ) from None


def refuse_inert(given: Mapping[str, Any], defaults: Mapping[str, Any], reason: str) -> None:
    """Raises `UserError` for the first option of `defaults` that was given and would do nothing.

    An option counts as given if its value in `given` differs from its default. `reason` ends the
    sentence "--eta 1 has no effect: ...".
    """
    for name, default in defaults.items():
        value = given[name]
        if value != default:
            shown = "" if value is True else f" {text_of(value)}"
            raise UserError(f"--{name.replace('_', '-')}{shown} has no effect: {reason}.")


def text_of(value: object) -> str:
    """Returns an option's value as it was typed."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
