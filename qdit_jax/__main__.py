"""`python -m qdit_jax` is `qdit`."""

import sys

from qdit_jax.cli import main

sys.exit(main())
