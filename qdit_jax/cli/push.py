"""`qdit push`: a checkpoint with a model card to the Hugging Face hub."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.options import SubParsers, verb_parser
from qdit_jax.cli.paths import path_option

HELP = """\
Upload a checkpoint to the Hugging Face hub: one packed .safetensors file and a README.md that says what
it is, from what, how it was quantized, its bytes, what was measured, and how to load it. The repository
is created if it does not exist; files of the same names in it are replaced, others stay.

Needs pip install 'qdit-jax[hub]', and a token that may write in HF_TOKEN. --dry-run writes the same files
to a folder instead.

examples:
  qdit push xl2-w4a8 hf:me/DiT-XL-2-w4a8 --license cc-by-nc-4.0
  qdit push xl2-w4a8 hf:me/DiT-XL-2-w4a8 --measured compared/metrics.json --private
  qdit push xl2-w4a8 hf:me/DiT-XL-2-w4a8 --dry-run to-be-pushed
"""
FILE = "model.safetensors"


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "push", HELP)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=path_option, help="checkpoint folder or exported file")
    add("repo", metavar="hf:OWNER/NAME", help="the repository to write to")
    add("--license", metavar="ID", help="of the weights, as the hub spells it: apache-2.0, ...")
    add(
        "--measured",
        metavar="FILE",
        type=path_option,
        help="metrics.json of `qdit evaluate`, for the card",
    )
    add("--private", action="store_true", help="create the repository as a private one")
    add("--dry-run", metavar="DIR", type=path_option, help="write the files to a new folder only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the files, uploads them and returns where they are."""
    import tempfile
    from pathlib import Path

    from qdit_jax.files import hub_id, uploaded

    wanted = hub_id(args.repo)
    if args.dry_run is not None:
        check_new(args.dry_run)
        args.dry_run.mkdir(parents=True)
        size = write_files(args.checkpoint, args.dry_run, wanted.repo, args.license, args.measured)
        print(f"wrote {args.dry_run}, {size:,} bytes; nothing was uploaded")
        return {"out": args.dry_run, "bytes": size}
    with tempfile.TemporaryDirectory(prefix="qdit-") as folder:
        size = write_files(args.checkpoint, Path(folder), wanted.repo, args.license, args.measured)
        message = f"{args.checkpoint.name}, written by qdit"
        url = uploaded(Path(folder), args.repo, private=args.private, message=message)
    print(f"uploaded {size:,} bytes to {url}")
    return {"repo": wanted.repo, "url": url, "bytes": size}


def check_new(folder: Any) -> None:
    """Raises `UserError` if something stands at `folder`."""
    from qdit_jax.errors import UserError

    if folder.exists():
        raise UserError(f"--dry-run {folder} exists; name a new folder.")


def write_files(path: Any, folder: Any, repo: str, license: str | None, measured_file: Any) -> int:
    """Writes the exported checkpoint and its card to `folder`; returns the bytes of both."""
    from qdit_jax import checkpoint
    from qdit_jax.errors import UserError
    from qdit_jax.evaluation import MEASURES
    from qdit_jax.files import num_bytes, read_once
    from qdit_jax.report import model_card

    measured = None
    if measured_file is not None:
        try:
            measured = read_once(measured_file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--measured {measured_file}: {error}") from None
        if not isinstance(measured, dict) or "paired" not in measured:
            raise UserError(
                f"--measured {measured_file} holds no paired measures; give the metrics.json that "
                "`qdit evaluate CKPT --against REF --out DIR` writes."
            )
    loaded = checkpoint.load(path)
    checkpoint.save_safetensors(folder / FILE, loaded)
    card = model_card(loaded, repo, FILE, license=license, measured=measured, names=MEASURES)
    (folder / "README.md").write_text(card)
    return num_bytes(folder)
