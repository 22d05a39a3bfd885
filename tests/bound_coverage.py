"""How often each bound of align/bounds.py fails, over many simulated samples whose truth is known.

`python tests/bound_coverage.py [repetitions]` prints the table of docs/log.md. A bound keeps its promise where
the share of failures, given with its exact 99 % interval, is not shown to be above delta. The last rows are
no bounds of ours: they show what goes wrong without a correction, or with Student's t.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from align import bounds, claims

DELTA = 0.05
SEED = 20260101

rate_upper = functools.cache(bounds.rate_upper)
rate_lower = functools.cache(bounds.rate_lower)
judged_rate_upper = functools.cache(bounds.judged_rate_upper)

Rng = np.random.Generator
Draw = Callable[[Rng, int], np.ndarray]
"""Costs of a sample of so many prompts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    fails: Callable[[Rng], bool]
    """Draw one sample; tell whether what was concluded from it is wrong."""
    is_bound: bool = True
    """Whether it promises to fail in a share of at most `DELTA`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    failures: int
    repetitions: int

    @property
    def interval(self) -> tuple[float, float]:
        found = stats.binomtest(self.failures, self.repetitions).proportion_ci(0.99, method="exact")
        return float(found.low), float(found.high)


def simulate(setting: Setting, repetitions: int) -> Result:
    rng = np.random.default_rng([SEED, *setting.name.encode()])
    return Result(failures=sum(setting.fails(rng) for _ in range(repetitions)), repetitions=repetitions)


# One claim --------------------------------------------------------------------------------------------------


def rate(num: int, truth: float) -> Setting:
    def fails(rng: Rng) -> bool:
        return rate_upper(int(rng.binomial(num, truth)), num, DELTA) < truth

    return Setting(name=f"Clopper-Pearson upper, n={num}, rate {truth}", fails=fails)


def lower_rate(num: int, truth: float) -> Setting:
    def fails(rng: Rng) -> bool:
        return rate_lower(int(rng.binomial(num, truth)), num, DELTA) > truth

    return Setting(name=f"Clopper-Pearson lower, n={num}, rate {truth}", fails=fails)


def draw_judged(rng: Rng, num: int, truth: float, recall: float, false_alarms: float) -> int:
    num_unsafe = rng.binomial(num, truth)
    return int(rng.binomial(num_unsafe, recall) + rng.binomial(num - num_unsafe, false_alarms))


def judged(num: int, truth: float, recall: float, false_alarms: float, labelled: int) -> Setting:
    def fails(rng: Rng) -> bool:
        flagged, found = draw_judged(rng, num, truth, recall, false_alarms), int(rng.binomial(labelled, recall))
        return judged_rate_upper(flagged, num, found, labelled, DELTA) < truth

    errors = f"recall {recall} from {labelled} clips, false alarms {false_alarms}"
    return Setting(name=f"judged rate, n={num}, rate {truth}, {errors}", fails=fails)


def uncorrected(num: int, truth: float, recall: float) -> Setting:
    def fails(rng: Rng) -> bool:
        return rate_upper(draw_judged(rng, num, truth, recall, 0.0), num, DELTA) < truth

    return Setting(name=f"no correction for recall {recall}, n={num}, rate {truth}", fails=fails, is_bound=False)


COSTS: dict[str, tuple[Draw, float]] = {
    "Beta(1, 9)": (lambda rng, num: rng.beta(1, 9, num), 0.1),
    "Beta(0.2, 1.8)": (lambda rng, num: rng.beta(0.2, 1.8, num), 0.1),
    "0 or 1, rate 0.02": (lambda rng, num: rng.binomial(1, 0.02, num).astype(float), 0.02),
    "0 or 1, rate 0.3": (lambda rng, num: rng.binomial(1, 0.3, num).astype(float), 0.3),
}


def bernstein(num: int, costs: str) -> Setting:
    draw, truth = COSTS[costs]
    return Setting(
        name=f"empirical Bernstein, n={num}, costs {costs}",
        fails=lambda rng: bounds.bernstein_upper(draw(rng, num), DELTA) < truth,
    )


def betting(num: int, costs: str) -> Setting:
    draw, truth = COSTS[costs]
    return Setting(
        name=f"betting upper, n={num}, costs {costs}",
        fails=lambda rng: bounds.betting_upper(draw(rng, num), DELTA) < truth,
    )


def winning(num: int, wins: float, ties: float) -> Setting:
    def fails(rng: Rng) -> bool:
        values = rng.choice([1.0, 0.5, 0.0], num, p=[wins, ties, 1 - wins - ties])
        return bounds.betting_lower(values, DELTA) > wins + ties / 2

    return Setting(name=f"betting lower, n={num}, {wins} wins and {ties} ties", fails=fails)


def student(num: int, costs: str) -> Setting:
    draw, truth = COSTS[costs]

    def fails(rng: Rng) -> bool:
        found = draw(rng, num)
        return found.mean() + stats.t.isf(DELTA, num - 1) * found.std(ddof=1) / np.sqrt(num) < truth

    return Setting(name=f"Student's t, n={num}, costs {costs}", fails=fails, is_bound=False)


# Several claims ---------------------------------------------------------------------------------------------

TAG_RATES = (0.06, 0.051, 0.06, 0.051, 0.01, 0.0, 0.02, 0.03, 0.051, 0.06, 0.01, 0.0)
TAG_LIMIT = 0.05


def draw_tags(rng: Rng, num: int) -> list[bounds.Upper]:
    return [functools.partial(rate_upper, int(rng.binomial(num, truth)), num) for truth in TAG_RATES]


def one_fails(uppers: list[float]) -> bool:
    return any(upper < truth for upper, truth in zip(uppers, TAG_RATES, strict=True))


def all_tags_by_bonferroni(num: int) -> Setting:
    name = f"Bonferroni, any of 12 tags, n={num} each"
    return Setting(name=name, fails=lambda rng: one_fails(bounds.bonferroni(draw_tags(rng, num), DELTA)))


def all_tags_by_holm(num: int) -> Setting:
    limits = [TAG_LIMIT] * len(TAG_RATES)
    name = f"Holm, any of 12 tags, n={num} each"
    return Setting(name=name, fails=lambda rng: one_fails(bounds.holm(draw_tags(rng, num), limits, DELTA)))


Tested = Literal["each", "in common", "as if known"]
"""How the judge's recall is: for each rate, once for all, or once and taken for the truth, which gives no bound."""


def draw_judged_all(
    rng: Rng, rates: Sequence[float], num: int, recall: float, labelled: int, tested: Tested
) -> list[bounds.Upper]:
    found = np.broadcast_to(rng.binomial(labelled, recall, len(rates) if tested == "each" else 1), len(rates))
    upper = recall_as_if_known if tested == "as if known" else judged_rate_upper
    return [
        functools.partial(upper, draw_judged(rng, num, truth, recall, 0.0), num, hits, labelled)
        for truth, hits in zip(rates, found.tolist(), strict=True)
    ]


def recall_as_if_known(flagged: int, num: int, found: int, labelled: int, delta: float) -> float:
    return rate_upper(flagged, num, delta) * labelled / found


def all_judged_tags_by_holm(num: int, recall: float, labelled: int, tested: Tested) -> Setting:
    limits = [TAG_LIMIT] * len(TAG_RATES)

    def fails(rng: Rng) -> bool:
        uppers = draw_judged_all(rng, TAG_RATES, num, recall, labelled, tested)
        return one_fails(bounds.holm(uppers, limits, DELTA))

    name = f"Holm, any of 12 tags, n={num} each, recall {recall} from {labelled} clips {tested}"
    return Setting(name=name, fails=fails, is_bound=tested != "as if known")


def all_tags_uncorrected(num: int) -> Setting:
    return Setting(
        name=f"no correction for 12 tags, n={num} each",
        fails=lambda rng: one_fails([upper(DELTA) for upper in draw_tags(rng, num)]),
        is_bound=False,
    )


CANDIDATE_RATES = (0.005, 0.02, 0.03, 0.0501, 0.051, 0.055, 0.06, 0.04)
"""Safest first as planned; the plan is wrong about the last."""


def draw_candidates(rng: Rng, num: int) -> list[bounds.Upper]:
    return [functools.partial(rate_upper, int(rng.binomial(num, truth)), num) for truth in CANDIDATE_RATES]


def passes_wrongly(uppers: list[bounds.Upper]) -> bool:
    passed = bounds.fixed_sequence(uppers, TAG_LIMIT, DELTA)
    return any(truth > TAG_LIMIT for truth in CANDIDATE_RATES[:passed])


def chosen_by_fixed_sequence(num: int) -> Setting:
    name = f"Learn-then-Test, 8 candidates, n={num}"
    return Setting(name=name, fails=lambda rng: passes_wrongly(draw_candidates(rng, num)))


def chosen_by_fixed_sequence_judged(num: int, recall: float, labelled: int, tested: Tested) -> Setting:
    def fails(rng: Rng) -> bool:
        return passes_wrongly(draw_judged_all(rng, CANDIDATE_RATES, num, recall, labelled, tested))

    name = f"Learn-then-Test, 8 candidates, n={num}, recall {recall} from {labelled} clips {tested}"
    return Setting(name=name, fails=fails, is_bound=tested != "as if known")


LIMITED_RATES = ((0.01, 0.02), (0.02, 0.0501), (0.0501, 0.01))
"""Of each candidate, one under each of two limits."""


def certified(num: int, recall: float, labelled: int) -> Setting:
    """Do as `align.certificate` does: a fixed sequence of candidates, each under limits by Holm."""

    def fails(rng: Rng) -> bool:
        limit = claims.Limit(limit=TAG_LIMIT, recall_n=labelled, recall_hits=int(rng.binomial(labelled, recall)))
        candidates = [
            [claims.count_claim(limit, draw_judged(rng, num, truth, recall, 0.0), num) for truth in rates]
            for rates in LIMITED_RATES
        ]
        passed = bounds.fixed_sequence([functools.partial(claims.excess, each) for each in candidates], 0.0, DELTA)
        chosen = max(0, passed - 1)
        uppers = [line.upper_bound for line in claims.judge(candidates[chosen], DELTA, chosen=True)]
        return any(upper is None or upper < truth for upper, truth in zip(uppers, LIMITED_RATES[chosen], strict=True))

    name = f"certificate, 3 candidates with 2 limits, n={num}, recall {recall} from {labelled} clips in common"
    return Setting(name=name, fails=fails)


def chosen_freely(num: int) -> Setting:
    def fails(rng: Rng) -> bool:
        kept = [upper(DELTA) <= TAG_LIMIT for upper in draw_candidates(rng, num)]
        return any(passes and truth > TAG_LIMIT for passes, truth in zip(kept, CANDIDATE_RATES, strict=True))

    return Setting(name=f"any of 8 candidates that passes, n={num}", fails=fails, is_bound=False)


SETTINGS = [
    *(rate(num, truth) for num in (100, 300) for truth in (0.01, 0.05, 0.3)),
    lower_rate(300, 0.05),
    judged(300, 0.05, recall=0.61, false_alarms=0.0, labelled=100),
    judged(300, 0.05, recall=0.95, false_alarms=0.0, labelled=100),
    judged(300, 0.05, recall=0.95, false_alarms=0.02, labelled=100),
    judged(1000, 0.02, recall=0.8, false_alarms=0.0, labelled=30),
    judged(100000, 0.02, recall=0.8, false_alarms=0.0, labelled=30),
    *(bernstein(300, costs) for costs in ("Beta(1, 9)", "0 or 1, rate 0.3")),
    *(betting(300, costs) for costs in COSTS),
    betting(50, "0 or 1, rate 0.3"),
    winning(100, wins=0.5, ties=0.2),
    all_tags_by_bonferroni(100),
    all_tags_by_holm(100),
    all_tags_by_holm(1000),
    all_judged_tags_by_holm(1000, recall=0.8, labelled=100, tested="each"),
    all_judged_tags_by_holm(1000, recall=0.8, labelled=100, tested="in common"),
    all_judged_tags_by_holm(10000, recall=0.8, labelled=100, tested="each"),
    chosen_by_fixed_sequence(300),
    chosen_by_fixed_sequence_judged(1000, recall=0.8, labelled=100, tested="in common"),
    chosen_by_fixed_sequence_judged(3000, recall=0.8, labelled=300, tested="in common"),
    chosen_by_fixed_sequence_judged(100000, recall=0.8, labelled=100, tested="in common"),
    certified(3000, recall=0.8, labelled=300),
    uncorrected(300, 0.05, recall=0.61),
    student(50, "0 or 1, rate 0.02"),
    student(50, "Beta(0.2, 1.8)"),
    all_tags_uncorrected(1000),
    all_judged_tags_by_holm(10000, recall=0.8, labelled=100, tested="as if known"),
    chosen_freely(300),
    chosen_by_fixed_sequence_judged(10000, recall=0.8, labelled=100, tested="as if known"),
]


def main(repetitions: int) -> None:
    print(f"| what, delta {DELTA} | failures of {repetitions} | share | 99 % interval |")
    print("|---|---|---|---|")
    for setting in SETTINGS:
        result = simulate(setting, repetitions)
        low, high = result.interval
        share = result.failures / repetitions
        print(f"| {setting.name} | {result.failures} | {share:.4f} | {low:.4f} to {high:.4f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
