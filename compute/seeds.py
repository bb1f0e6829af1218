"""Seeds for all randomness in a run."""

import numpy as np


def seed_for(seed: int, purpose: str, number: int = 0) -> int:
    """Return a seed in [0, 2**63) that depends on the arguments only, so a resumed run needs no generator's state.
    seed: the run's (--seed). purpose: a text such as "batches". number: for a purpose that recurs."""
    return int(np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(1, np.uint64)[0] >> 1)
