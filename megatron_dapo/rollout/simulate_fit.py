"""How fast engines are, from when requests were sent and answered.

An engine with n running sequences takes a + b n seconds for a token of each. So a request takes
a S + b T + c Q + d seconds: S decoding steps of its engine passed meanwhile, T tokens were made, Q prompt
tokens were read, and d seconds are spent outside the engine. S, T and Q are those of a simulated engine that
gets the requests when the real one got them; all requests together are a least-squares problem in a, b, c, d.
With the numbers found S, T and Q are taken anew, a few times.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate_clock import Meter, run_virtual
from megatron_dapo.rollout.simulate_engine import Engine
from megatron_dapo.rollout.simulate_model import Profile

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # running sequences that the speed table lists
ROUNDS = 8
FEWEST = 4  # requests
WORTH = 0.2
UNLIMITED = 1e12


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a run: its engine's name, when it was sent and when it was answered or aborted, its
    prompt's tokens, and those of each response. load_only: it takes part in the load, and its own seconds
    are no evidence, for it was aborted or what ran beside it is not known.
    """

    engine: str
    sent: float
    answered: float
    prompt_tokens: int
    lengths: tuple[int, ...]
    load_only: bool = False

    @property
    def seconds(self) -> float:
        return self.answered - self.sent


@dataclass(frozen=True, slots=True)
class Speed:
    """step_s: a, sequence_s: b, prompt_s: c, request_s: d; seconds."""

    step_s: float
    sequence_s: float
    prompt_s: float = 0.0
    request_s: float = 0.0

    def numbers(self, max_running: int) -> dict[str, Any]:
        """As a Profile has them."""
        sizes = {*(n for n in SIZES if n < max_running), max_running}
        return {
            "tokens_per_second": {n: n / (self.step_s + self.sequence_s * n) for n in sorted(sizes)},
            "prefill_tokens_per_second": 1 / self.prompt_s if self.prompt_s > 0 else UNLIMITED,
            "request_s": self.request_s,
        }


def fit_engines(requests: Sequence[Request], max_running: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers of a Profile that say how fast an engine is, and what each is from. UserError for too few
    requests.
    """
    answered = [request for request in requests if not request.load_only]
    if len(answered) < FEWEST:
        raise UserError(f"{len(answered)} requests are too few to calibrate engines from; give a longer run")
    by_engine: defaultdict[str, list[Request]] = defaultdict(list)
    for request in sorted(requests, key=lambda request: request.sent):
        by_engine[request.engine].append(request)
    seconds_N = np.array(
        [max(r.seconds, 1e-6) for of_one in by_engine.values() for r in of_one if not r.load_only]
    )
    speed, error, running = _first_guess(by_engine), math.inf, 0.0
    for _ in range(ROUNDS):
        parts = [_replay(of_one, speed, max_running) for of_one in by_engine.values()]
        factors_N4 = np.concatenate(parts)
        running = float(np.max(factors_N4[:, 1] / np.maximum(factors_N4[:, 0], 1)))
        found, error = nonnegative_least_squares(factors_N4, seconds_N)
        if not found[0] + found[1] > 0:  # all take as long, whatever their lengths
            found, error = nonnegative_least_squares(factors_N4 * [1, 1, 0, 0], seconds_N)
        speed = Speed(*found.tolist())
    source = (
        f"least squares over {len(answered)} requests of {len(by_engine)} engines with up to {running:.0f} "
        f"sequences at once; a request takes {np.median(seconds_N):.3g} s, met within {error:.1%} (root mean "
        "square)"
    )
    unseen = "too little to be told apart: no time is taken for it"
    return speed.numbers(max_running), {
        "tokens_per_second": f"n / ({speed.step_s:.3g} s + {speed.sequence_s:.3g} s x n); {source}",
        "prefill_tokens_per_second": source if speed.prompt_s > 0 else unseen,
        "request_s": source if speed.request_s > 0 else unseen,
    }


def _first_guess(by_engine: Mapping[str, Sequence[Request]]) -> Speed:
    """Half of a decoding step's seconds for the step, half for the sequences. A replay with far too slow an
    engine would pile up requests and not come back from there.
    """
    numbers, steps_s = [], []
    for requests in by_engine.values():
        for request in requests:
            middle = request.sent + request.seconds / 2
            numbers.append(
                sum(
                    other.sent + other.seconds * length / max(other.lengths) > middle
                    for other in requests
                    if other.sent <= middle < other.answered
                    for length in other.lengths
                )
            )
            steps_s.append(request.seconds / max(request.lengths))
    step_s = median(steps_s)
    return Speed(step_s / 2, step_s / 2 / max(1.0, median(numbers)))


def _replay(requests: Sequence[Request], speed: Speed, max_running: int) -> np.ndarray:
    """[S, T, Q, 1] of each request of one engine that is evidence, float64 [N, 4]."""
    profile = Profile(
        **speed.numbers(max_running), kv_tokens=UNLIMITED, start_s=0, sync_s=0, train_tokens_per_second=1
    )
    rows = np.ones((len(requests), 4))

    async def main() -> None:
        engine = Engine(0, profile, max_running=max_running, stalled_after_s=math.inf, meter=Meter())
        engine.is_up, engine.version = True, 0

        async def one(index: int, request: Request) -> None:
            await asyncio.sleep(request.sent - requests[0].sent)
            await asyncio.sleep(speed.request_s)
            before = np.array(engine.work())
            sent = engine.submit(request.prompt_tokens, request.lengths)
            if not request.load_only:
                await sent.done
                rows[index, :3] = np.array(engine.work()) - before
            else:
                await asyncio.wait([sent.done], timeout=request.seconds)
                engine.drop(sent)

        await asyncio.gather(*(one(*pair) for pair in enumerate(requests)))

    run_virtual(main)
    return rows[[not request.load_only for request in requests]]


def nonnegative_least_squares(
    factors: np.ndarray, values: np.ndarray, worth: float = WORTH
) -> tuple[np.ndarray, float]:
    """x >= 0 that minimises the squared *relative* errors of `factors @ x` against `values`, and their root
    mean square. factors float64 [N, F] with few columns: all subsets of them are tried, and one more is taken
    if it lessens the mean square by the share `worth`.
    """
    scaled, ones = factors / values[:, None], np.ones(len(values))
    best, least = np.zeros(factors.shape[1]), math.inf
    columns = range(factors.shape[1])
    for size in range(1, len(columns) + 1):
        at_most = least * (1 - worth)
        for chosen in map(list, itertools.combinations(columns, size)):
            found, *_ = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)
            error = float(np.mean((scaled[:, chosen] @ found - 1) ** 2))
            if (found >= 0).all() and error < min(at_most, least):
                best, least = np.zeros(len(columns)), error
                best[chosen] = found
    return best, math.sqrt(least)
