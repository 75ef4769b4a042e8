"""Where the arrays of reference code lie, and which of them are not kept in the repository."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "goldens"
GOLDEN_FOLDERS = (HERE / "goldens", SHARED)
# Too large to be kept here: they lie in SHARED alone, and their tests are skipped where that is absent.
IN_SHARED_ALONE = re.compile(
    r"dit_B_.*|dit_diffusers(_io\.npz)?"
    r"|dit_A_q_(w4a8_(cand_ref|g0|mse_g32|static_g0|static_g32|sym_g32)|w6a8_g96)\.npz"
    r"|families/pixart/alpha_(diffusers_1024ms|original_pth)"
)
