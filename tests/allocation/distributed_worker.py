"""Prints the fitness of fixed assignments, on the devices and processes that its arguments say.

python distributed_worker.py [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

from __future__ import annotations

import json
import sys

import jax


def main() -> None:
    if len(sys.argv) > 1:
        jax.distributed.initialize(
            sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), heartbeat_timeout_seconds=10
        )
    import numpy as np
    from search_models import batches_of_noise, search, small_model, small_rollout, small_space

    model, params = small_model()
    space = small_space(params)
    objective = search.paired_error(small_rollout(model, 2), params, *batches_of_noise(model, 2, 2))
    evaluator = search.Evaluator(space, params, objective)
    drawn = np.random.default_rng(0).integers(0, 4, (5, len(space.layers)))
    fitness = evaluator(drawn)
    found = {
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "compilations": evaluator.num_compilations,
        "fitness": [value.hex() for value in fitness.tolist()],
    }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
