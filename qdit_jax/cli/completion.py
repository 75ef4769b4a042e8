"""`qdit completion`: the script that completes verbs, options and their choices in a shell."""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module
from typing import Any

from qdit_jax.cli.options import SubParsers, verb_parser

HELP = """\
Print a script with which the shell completes verbs, options and their choices with TAB; everything
else is completed as a file name.

examples:
  source <(qdit completion bash)                      # in this shell; or in ~/.bashrc
  qdit completion zsh > ~/.zsh/qdit.zsh               # and `source ~/.zsh/qdit.zsh` in ~/.zshrc
"""
SCRIPT = """\
_qdit() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
  if (( COMP_CWORD == 1 )); then
    words={verbs}
  else
    case "${{COMP_WORDS[1]}} $before" in
{choices}
      *) case "${{COMP_WORDS[1]}}" in
{options}
      esac ;;
    esac
    [[ $word == -* || $words != -* ]] || words=""
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -F _qdit qdit
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb."""
    parser = verb_parser(subparsers, "completion", HELP)
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that runs the script")
    parser.set_defaults(run=run, uses_jax=False)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the script."""
    script = (ZSH if args.shell == "zsh" else "") + bash_script()
    print(script, end="")
    return {"script": script}


def bash_script() -> str:
    """Returns bash's completion of every verb that there is."""
    from qdit_jax.cli import VERBS, module_of

    subparsers = argparse.ArgumentParser(prog="qdit").add_subparsers()
    choices, options = [], []
    for verb in VERBS:
        import_module(module_of(verb)).add_parser(subparsers)
        parser = subparsers.choices[verb]
        for action in parser._actions:
            offered = shlex.quote(" ".join(map(str, action.choices or ())))
            for name in action.option_strings if action.choices else ():
                choices.append(f"      {shlex.quote(f'{verb} {name}')}) words={offered} ;;")
        names = sorted(n for a in parser._actions for n in a.option_strings if n.startswith("--"))
        options.append(f"        {verb}) words={shlex.quote(' '.join(names))} ;;")
    return SCRIPT.format(
        verbs=shlex.quote(" ".join(VERBS)), choices="\n".join(choices), options="\n".join(options)
    )
