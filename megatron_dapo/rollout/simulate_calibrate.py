"""A simulator's numbers from what a run has measured about itself: `<run.dir>/facts.jsonl`, one line a step.

    calibration = calibrate(Path("runs/tiny"), config)     # config: as the run saved it

Engines: simulate_fit.py. What ran and was never finished is not in the facts, so the speed of a strict run's
engines is then scaled until the simulated rollouts of its own configuration take as long as they did.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_fit import Request, fit_engines
from megatron_dapo.rollout.simulate_model import KNOWN, Profile, plan
from megatron_dapo.rollout.simulate_observed import ObservedStream
from megatron_dapo.types import GroupFacts, Timing

FACTS = "facts.jsonl"
SPREAD = 1.2  # largest over smallest step, in trained tokens, from which on a constant can be told apart
ENOUGH = 400  # requests to fit engines to
SCALINGS, SCALING_GROUPS, MOST_STEPS = 3, 600, 40  # simulations, groups and steps in each of them
UNKNOWN_KV, UNKNOWN_START_S = 1e12, 30.0  # tokens, where nothing was seen to be full; seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """One line of the file. phases: seconds of the trainer's phases by name, of all with that name; rollout:
    (begin, end) of the rollout, seconds of the clock that the groups' timings have; pushes: the same of
    every weight push.
    """

    step: int
    phases: dict[str, float]
    rollout: tuple[float, float]
    pushes: tuple[tuple[float, float], ...]
    tokens: int  # prompts and responses that were trained on
    groups: tuple[GroupFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """profile: the numbers. engines: of the run. groups: of the prompt stream, in its order, none left out
    for its length or verdict. longest: the cap that they were sampled under. report: what was calibrated
    from what.
    """

    profile: Profile
    engines: int
    groups: tuple[GroupFacts, ...]
    longest: int
    report: dict[str, Any]


def load_facts(run_dir: Path) -> list[StepFacts]:
    """All steps of a run. UserError without the file, for an empty one and for a line that is not whole."""
    file = run_dir / FACTS
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; --from wants the folder of a run (run.dir) that has made "
            "a step"
        ) from error
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(_step(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}, line {number}: {type(error).__name__}: {error}") from error
    if not any(step.groups for step in steps):
        raise UserError(f"{file} tells of no group; calibrate with a run that has made a step")
    return steps


def _step(line: dict[str, Any]) -> StepFacts:
    phases = defaultdict[str, float](float)
    for name, begin, end in line["phases"]:
        phases[name] += end - begin
    spans, pushes = (
        [(begin, end) for name, begin, end in line["phases"] if name == wanted]
        for wanted in ("rollout", "sync")
    )
    return StepFacts(
        step=line["step"],
        phases=dict(phases),
        rollout=(min(begin for begin, _ in spans), max(end for _, end in spans)),
        pushes=tuple(pushes),
        tokens=line["trained_tokens"] + line["prompt_tokens_trained"],
        groups=tuple(_group(values) for values in line["groups"]),
    )


def _group(values: dict[str, Any]) -> GroupFacts:
    timing = None
    if values["timing"] is not None:
        engine, sent, answered, graded = values["timing"]
        timing = Timing(engine=engine, sent=sent, answered=answered, graded=graded)
    lists = {name: tuple(values[name]) for name in ("lengths", "correct", "truncated")}
    lists["correct"] = tuple(map(bool, lists["correct"]))  # what was not graded: the simulator knows no third
    return GroupFacts(**{**values, **lists, "timing": timing})


def calibrate(run_dir: Path, config: RunConfig) -> Calibration:
    """The simulator's numbers from a run and the configuration that it had. What a run does not tell is
    planned for a known model, else assumed; `report` says so. The first of several steps only warms up.
    """
    steps = load_facts(run_dir)
    consumed = _consumed(steps, config)
    warm = steps[1:] if len(steps) > 2 else steps
    decode, decode_report = fit_engines(_requests(warm, config), config.rollout.max_concurrency)
    train, train_report = _training(warm)
    last = {step.step: _last_graded(step) for step in warm}
    around = [max(0.0, step.rollout[1] - last[step.step]) for step in warm if last[step.step]]
    grading = [g.timing.graded - g.timing.answered for step in warm for g in step.groups if g.timing]
    known = Path(config.model.path).name in KNOWN
    start_s, kv_tokens = UNKNOWN_START_S, UNKNOWN_KV
    if known:
        planned = plan(config)
        start_s, kv_tokens = planned.start_s, planned.kv_tokens
    profile = Profile(
        **decode,
        **train,
        sync_s=fmean(step.phases.get("sync", 0.0) for step in warm),
        rollout_s=fmean(around) if around else 0.0,
        grade_s=fmean(grading) if grading else 0.0,
        prompt_tokens=max(1, round(fmean(group.prompt_tokens for group in consumed))),
        start_s=start_s,
        kv_tokens=kv_tokens,
    )
    engines = len({g.timing.engine for step in steps for g in step.groups if g.timing})
    profile, scale_report = _scaled(profile, config, consumed, engines, steps, warm)
    decode_report["tokens_per_second"] += scale_report
    report = {
        "run": str(run_dir),
        "engines": engines,
        "measured": {
            "lengths and verdicts": f"{len(consumed)} groups that {len(steps)} steps consumed",
            **decode_report,
            **train_report,
            "sync_s": f"mean of {len(warm)} pushes",
            "rollout_s": f"mean of {len(around)} steps: from the last grade to the end of the rollout",
            "grade_s": f"mean of {len(grading)} groups",
        },
        "planned" if known else "assumed": {"start_s": start_s, "kv_tokens": kv_tokens},
        "numbers": dataclasses.asdict(profile),
    }
    return Calibration(
        profile=profile,
        engines=engines,
        groups=tuple(consumed),
        longest=config.rollout.max_tokens,
        report=report,
    )


def _scaled(
    profile: Profile,
    config: RunConfig,
    groups: Sequence[GroupFacts],
    engines: int,
    steps: Sequence[StepFacts],
    warm: Sequence[StepFacts],
) -> tuple[Profile, str]:
    """The profile with engines of a speed at which a strict run's rollouts take their seconds."""
    if config.sampling.max_age:
        return profile, ""
    wanted, scale = fmean(step.phases["rollout"] for step in warm), 1.0
    longest = config.rollout.max_tokens
    num_steps = min(MOST_STEPS, max(len(steps), math.ceil(SCALING_GROUPS / config.sampling.prompts_per_step)))
    for seed in range(SCALINGS):
        stream = ObservedStream(groups, longest=longest, seed=seed, max_tokens=longest)
        result = Simulation(config, profile, stream, engines=engines, steps=num_steps).simulate()
        factor = result["rollout_seconds"] / wanted
        speeds = {n: speed * factor for n, speed in profile.tokens_per_second.items()}
        prefill = profile.prefill_tokens_per_second * factor
        profile = dataclasses.replace(profile, tokens_per_second=speeds, prefill_tokens_per_second=prefill)
        scale *= factor
    return (
        profile,
        f"; then times {scale:.3f}, so that {num_steps} simulated rollouts take {wanted:.3g} s each",
    )


def _consumed(steps: Sequence[StepFacts], config: RunConfig) -> list[GroupFacts]:
    """The groups up to the last trained one, in stream order: what lies behind is short rather than long,
    because only some of it had finished.
    """
    options = config.sampling
    strict = [list(step.groups) for step in steps]
    batches = strict if options.max_age == 0 else [[group for groups in strict for group in groups]]
    wanted = options.prompts_per_step * (1 if options.max_age == 0 else len(steps))
    consumed: list[GroupFacts] = []
    for groups in batches:
        left = wanted
        for group in sorted(groups, key=lambda group: group.position):
            consumed.append(group)
            left -= group.verdict == "accepted" or not options.dynamic
            if not left:
                break
    return consumed


def _requests(steps: Sequence[StepFacts], config: RunConfig) -> list[Request]:
    """The newest requests, about ENOUGH. Seconds in which weights were pushed do not count: the engines stand
    still.
    """
    pushes = [span for step in steps for span in step.pushes]
    before = np.cumsum([0.0, *(end - begin for begin, end in pushes)])

    def working(second: float) -> float:
        passed = bisect.bisect_right([begin for begin, _ in pushes], second)
        inside = max(0.0, pushes[passed - 1][1] - second) if passed else 0.0
        return second - (before[passed] - inside)

    requests: list[Request] = []
    for step in reversed(steps):
        answered = [_request(group) for group in step.groups if group.timing]
        aborted = _aborted(step, answered) if config.sampling.max_age == 0 else []
        requests += [
            dataclasses.replace(r, sent=working(r.sent), answered=working(r.answered))
            for r in (*answered, *aborted)
        ]
        if len(requests) >= ENOUGH:
            break
    if config.sampling.max_age:  # what ran before the first of these, and with the last of them, is not here
        requests.sort(key=lambda request: request.sent)
        edge = len(requests) // 4
        for i in (*range(edge), *range(len(requests) - edge, len(requests))):
            requests[i] = dataclasses.replace(requests[i], load_only=True)
    return requests


def _request(group: GroupFacts) -> Request:
    t = group.timing
    assert t is not None
    return Request(t.engine, t.sent, t.answered, group.prompt_tokens, group.lengths)


def _aborted(step: StepFacts, answered: Sequence[Request]) -> list[Request]:
    """What ran when a strict step was full, and was aborted: the prompts that are missing between those
    that have finished. Each is taken to have been sent when its neighbours were, to the engine that then had
    the fewest requests, and to be as long as a request that took at least as long.
    """
    groups = sorted((g for g in step.groups if g.timing), key=lambda group: group.position)
    if not groups:
        return []
    positions = [group.position for group in groups]
    missing = sorted({*range(positions[0], positions[-1])} - {*positions})
    chance, end = random.Random(step.step), step.rollout[1]
    engines = sorted({request.engine for request in answered})
    aborted: list[Request] = []
    sent_by_position = [group.timing.sent for group in groups if group.timing]
    for sent in np.interp(missing, positions, sent_by_position).tolist():
        running = Counter(r.engine for r in (*answered, *aborted) if r.sent <= sent < r.answered)
        engine = min(engines, key=lambda name: running[name])
        longer = [r for r in answered if r.seconds >= end - sent]
        like = chance.choice(longer) if longer else max(answered, key=lambda r: r.seconds)
        aborted.append(Request(engine, sent, end, like.prompt_tokens, like.lengths, load_only=True))
    return aborted


def _last_graded(step: StepFacts) -> float:
    """When the last group that this step waited for was graded; 0 if it waited for none."""
    waited = [g.timing.graded for g in step.groups if g.timing and g.timing.graded <= step.rollout[1]]
    return max(waited, default=0.0)


# --- the policy


def _training(steps: Sequence[StepFacts]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tokens/s of training with what each step adds to it, in seconds; and from what."""
    seconds = np.array([step.phases.get("old_logprobs", 0.0) + step.phases["update"] for step in steps])
    tokens = np.array([step.tokens for step in steps], float)
    per_token, train_s = float(seconds.sum() / tokens.sum()), 0.0
    source = f"{len(steps)} steps of {tokens.min():.0f} to {tokens.max():.0f} tokens"
    if len(steps) > 2 and tokens.max() > SPREAD * tokens.min():
        slope, constant = np.polyfit(tokens, seconds, 1).tolist()
        if slope > 0 and constant > 0:
            per_token, train_s = slope, constant
        source = f"least squares over {source}"
    else:
        source += ", too alike to tell a constant from the tokens"
    return {"train_tokens_per_second": 1 / per_token, "train_s": train_s}, {
        "train_tokens_per_second": source,
        "train_s": source,
    }
