"""`qdit embed-text`: prompts to a file of conditions, by a pipeline's own text encoders."""

from __future__ import annotations

import argparse
from typing import Any

from qdit_jax.cli.options import SubParsers, positive_int, verb_parser
from qdit_jax.cli.paths import path_option
from qdit_jax.errors import UserError

PIPELINE_NAMES = (
    *("pixart-alpha", "pixart-sigma", "latte", "open-sora", "sd3", "flux"),
    *("flux2-klein", "z-image", "wan"),
)
HELP = """\
Embed prompts by the text encoders of a diffusers pipeline's folder, as its published pipeline does:
T5 (PixArt 120 tokens, Sigma 300, Latte 120; with a mask), both CLIPs and T5 (SD3: 77 + 256, no
mask), CLIP's pooled vector and T5 (FLUX: 512; schnell 256), Qwen3 behind its chat
template (FLUX.2 klein: 512, three layers side by side; Z-Image: 512, with a mask), UMT5 (Wan: 512,
zero-padded).

Writes OUT, an .npz of conditions that every verb takes as --embeds. Needs the extra [text] (torch and
transformers); nothing else does. One encoder is in memory at a time: T5-XXL takes 19 GB in float32.

examples:
  qdit embed-text PixArt-XL-2-512x512/ --prompts prompts.txt --out prompts.npz
  qdit embed-text stable-diffusion-3-medium-diffusers/ --prompts prompts.txt --null "" --out p.npz
  qdit embed-text t5-v1_1-xxl-folder/ --pipeline open-sora --prompts prompts.txt --out p.npz
"""


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "embed-text", HELP)
    add = parser.add_argument
    add("folder", metavar="MODEL_DIR", type=path_option, help="the folder of a diffusers pipeline")
    add(
        "--prompts",
        type=path_option,
        required=True,
        metavar="FILE",
        help="a text file with one prompt per line",
    )
    add("--out", type=path_option, default="prompts.npz", help="the .npz to write (%(default)s)")
    add(
        "--null",
        metavar="TEXT",
        help="also embed the null condition of guidance: '' or a negative prompt (none)",
    )
    add("--max-length", type=positive_int, help="tokens of the text (the pipeline's own)")
    add(
        "--pipeline",
        choices=PIPELINE_NAMES,
        help="how to embed, for folders without a model_index.json",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="that the encoders compute in (%(default)s)",
    )
    add("--batch-size", type=positive_int, default=8, help="prompts at once (%(default)s)")
    add("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run, uses_jax=False)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Embeds, writes, and returns what was written."""
    from qdit_jax.cli.embed_run import embedded
    from qdit_jax.files import check_free
    from qdit_jax.text import check_extra, read_prompts

    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out} must end in .npz.")
    check_free(args.out, args.force, "conditions", [args.folder, args.prompts])
    check_extra("qdit embed-text")
    prompts = read_prompts(args.prompts)
    found = embedded(
        args.folder,
        prompts,
        null=args.null,
        max_length=args.max_length,
        pipeline=args.pipeline,
        dtype=args.dtype,
        batch_size=args.batch_size,
    )
    from qdit_jax.sampling import write_conditions

    write_conditions(args.out, found.condition, found.prompts)
    shapes = {name: list(entry.shape) for name, entry in found.condition.items()}
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    print(f"wrote {args.out}: {len(prompts)} prompts as {found.pipeline} embeds them: {listed}")
    return {
        "out": args.out,
        "pipeline": found.pipeline,
        "num_prompts": len(prompts),
        "entries": shapes,
        "notes": list(found.notes),
    }
