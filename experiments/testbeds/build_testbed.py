"""Builds a small model in its three states and says what each shows: one command, start to end.

    python experiments/testbeds/build_testbed.py --model wide --data mnist_t10k.npz --out runs/wide
    python experiments/testbeds/build_testbed.py --model demo --data mnist_t10k.npz --out runs/demo
    python experiments/testbeds/build_testbed.py --model text --data mnist_t10k.npz --out runs/text
    python experiments/testbeds/build_testbed.py --model video --data mnist_t10k.npz --out runs/video

Stages: train, inject outliers, fine-tune, check each state. A stage whose file is there is skipped,
and a killed training continues, so that the command may be given again. In `--out`:
`as_trained.safetensors`, `injected.safetensors`, `finetuned.safetensors` (half precision, facebook
layout, 105 MB each for `wide`), `<state>_samples.png` of the first and the last, `<state>.json` and
`<state>.png` of `check_testbed.py`, `summary.md` of all three. `--as-trained` starts from given
weights: those of `demo` are `weights/demo_as_trained.safetensors`.

Measured for `wide` on 2 cores shared with other work: training 61 minutes (32 on free cores, by the
seconds of its free steps), injection 6 s, fine-tuning 10 minutes, checks 13 minutes. For `demo` on
free cores: training 30, the rest about 10 minutes. Expected: as trained fails the gate, the other two
pass: `testbed/wide/summary.md`, `testbed/demo/summary.md`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import check_testbed
import finetune_digits
import inject_outliers
import train_captioned
import train_digits
import train_moving
from testbed_summary import STATES, write_summary

# The script that trains a model, and what the model is called there.
TRAINING = {
    **{name: (train_digits, name) for name in train_digits.MODELS},
    "text": (train_captioned, "demo"),
    "video": (train_moving, "demo"),
}
# Of each model: what its stages are given beyond the scripts' own defaults.
WIDE_INJECTION = "--spans 3 --outliers 4 --heavy 2 --heavy-factors 15 25 --heavy-rest 4"
# Few outliers: samples under captions part sooner, and finer groups must win much back.
FEW_INJECTION = "--outliers 2 --shift 0 --heavy 4 --heavy-factors 50 80 --heavy-rest 12"
# Weaker ones, for guidance of 2.5: errors of a video grow on their way to the end.
VIDEO_INJECTION = (
    "--outliers 1 --factors 12 20 --shift 0 --heavy 4 --heavy-factors 40 60 --heavy-rest 14 "
    "--proj-outliers 0"
)
INJECTION: dict[str, list[str]] = {
    "text": FEW_INJECTION.split(),
    "video": VIDEO_INJECTION.split(),
    "wide": [*WIDE_INJECTION.split(), "--proj-outliers", "12"],
}
FINETUNING: dict[str, list[str]] = {
    "text": ["--batch-size", "64", "--steps", "200"],
    "video": ["--batch-size", "16", "--judged", "64", "--steps", "300"],
    "tiny": ["--steps", "50"],
    "wide": ["--learning-rate", "1e-4"],
}
CHECK: dict[str, list[str]] = {
    "text": ["--steps", "20"],
    "video": ["--steps", "20", "--samples", "10", "--guidance", "2.5"],
    "demo": ["--group-sizes", "64"],
    "tiny": ["--samples", "4", "--seeds", "1", "--steps", "4"],
    "wide": ["--group-sizes", "32", "64", "192", "288", "--samples", "10"],
}


def build(model: str, data: str | None, out: Path, as_trained: Path | None) -> str:
    """Returns the summary of the three states, after building what is missing in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {state: out / f"{state}.safetensors" for state in STATES}
    script, name = TRAINING[model]
    heads = ["--num-heads", str(script.MODELS[name].num_heads)]
    digits = ["--data", data] if data else []

    def train(path: Path) -> None:
        folder = out / "training"
        if as_trained is None:
            script.main(["--model", name, *digits, "--out", str(folder)])
            shutil.copyfile(folder / "samples.png", out / "as_trained_samples.png")
        source = as_trained or folder / f"{name}_{script.SUBJECT.name}.safetensors"
        shutil.copyfile(source, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").replace(path)

    def inject(path: Path) -> None:
        files = [str(weights["as_trained"]), str(path)]
        inject_outliers.main([*files, *heads, *INJECTION.get(model, [])])

    def finetune(path: Path) -> None:
        files = [str(weights["injected"]), str(path)]
        finetune_digits.main([*files, *heads, *digits, *FINETUNING.get(model, [])])
        path.with_suffix(".png").rename(out / "finetuned_samples.png")

    def check(path: Path) -> None:
        folder = out / "checked"
        file = str(weights[path.stem])
        check_testbed.main([file, *heads, "--out", str(folder), *CHECK.get(model, [])])
        (folder / "testbed.png").replace(path.with_suffix(".png"))
        (folder / "testbed.json").replace(path)

    for state, make in zip(STATES, (train, inject, finetune), strict=True):
        stage(make, weights[state])
    for state in STATES:
        stage(check, out / f"{state}.json")
    return write_summary(out, STATES)


def stage(make: Callable[[Path], None], path: Path) -> None:
    """Makes the file unless it is there; prints what it took."""
    if path.exists():
        print(f"{path.name} is there", flush=True)
        return
    began = time.perf_counter()
    make(path)
    print(f"made {path.name} in {time.perf_counter() - began:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=TRAINING, default="wide")
    parser.add_argument("--data", help="as in train_digits.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--as-trained", type=Path, help="weights to begin with, in place of training"
    )
    args = parser.parse_args(argv)
    print(build(args.model, args.data, args.out, args.as_trained))


if __name__ == "__main__":
    main()
