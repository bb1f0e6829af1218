"""Seeds for all that is random in a run."""

import numpy as np


def seed_for(seed, purpose, number=0):
    """Return a seed that depends on these three and nothing else, so that a resumed run needs no generator's state.

    seed: the run's (--seed). purpose: a text, such as "batches". number: for a purpose that comes again and again.
    """
    return int(np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(1, np.uint64)[0] >> 1)
