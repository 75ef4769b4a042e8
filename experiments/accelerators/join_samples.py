"""Writes the samples of several hosts as one file, which `qdit evaluate --samples` reads.

    python experiments/accelerators/join_samples.py OUT samples.npz

OUT holds `samples-0.npz`, `samples-1.npz`, ... of `sample_on_a_host.sh`. Expected: their arrays one after another, in
the order of the hosts; files that hold different arrays are refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def joined(files: list[Path]) -> dict[str, np.ndarray]:
    """Returns every array of the files, joined along its first axis.

    Raises:
        ValueError: if there is no file, or the files hold different arrays.
    """
    if not files:
        raise ValueError("no samples-N.npz there; run sample_on_a_host.sh first.")
    loaded = [np.load(file, allow_pickle=False) for file in files]
    for file, arrays in zip(files, loaded, strict=True):
        if set(arrays) != set(loaded[0]):
            raise ValueError(f"{file} holds {sorted(arrays)}, {files[0]} {sorted(loaded[0])}.")
    return {name: np.concatenate([arrays[name] for arrays in loaded]) for name in loaded[0]}


def host_number(file: Path) -> int:
    """Returns the number of the host that wrote a file."""
    return int(file.stem.rpartition("-")[2])


def main() -> None:
    """Joins what the command line names."""
    folder, out = map(Path, sys.argv[1:])
    files = sorted(folder.glob("samples-*.npz"), key=host_number)
    arrays = joined(files)
    np.savez(out, **arrays)
    print(f"{out}: {len(next(iter(arrays.values())))} samples of {len(files)} hosts")


if __name__ == "__main__":
    main()
