"""The soft overlong penalty of DAPO (arXiv 2503.14476, equation 13)."""

from __future__ import annotations


def overlong_penalty(num_tokens: int, max_tokens: int, cache: int) -> float:
    """What to add to the reward of a response of `num_tokens` tokens: 0 up to `max_tokens - cache`, then down
    in a line to -1 at `max_tokens`, -1 beyond. `cache=0` turns it off: always 0.
    """
    if cache == 0:
        return 0.0
    excess = num_tokens - (max_tokens - cache)
    return -min(max(excess, 0), cache) / cache if excess > 0 else 0.0
