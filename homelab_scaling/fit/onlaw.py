"""Whether a run is on the law: its held-out losses against a fitted L(N, D), since when they are off, and which way.

A loss measured before the learning rate has decayed lies above the law of finished runs. By how much is read off the
finished runs: their own trunks at the same tokens against the same law. Without any, only decayed losses are judged.

Legend:  R draw of the law, k finished run, G gap log(trunk loss / law)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.result import Draws, ScalingFit
from homelab_scaling.fit.words import listed, short

IN_A_ROW = 3
"""Points outside the band, one after another on one side, before a run is called off the law."""
FEW_FOR_TREND = 4
"""Finished runs from which on the gap may drift with size."""
MAX_DRAWS = 1000

Verdict = Literal["on the law", "above the law", "below the law", "not clear yet", "cannot be judged"]


@dataclass(frozen=True, kw_only=True)
class JointLaw:
    """A fitted law of N and D, its draws, and how far single runs scatter around it."""

    fit: ScalingFit
    law: Law
    draws: Draws

    @property
    def scatter(self) -> float:
        """Standard deviation of log loss; 0 where it was not published."""
        return self.fit.sigma_log or 0.0

    @property
    def spare(self) -> int:
        """Degrees of freedom behind the scatter."""
        return max(1, self.fit.n_points - len(self.law.free))

    def logs(self, n_params: float, tokens: Array) -> tuple[Array, Array]:
        """log loss at tokens (T,): of the optimum (T,) and of the draws (R, T)."""
        columns: dict[str, Array | float] = {"n_params": n_params, "n_tokens": tokens}
        some = self.draws.values[:MAX_DRAWS, None, :]
        with np.errstate(all="ignore"):
            return np.log(self.law.loss(self.draws.point, columns)), np.log(self.law.loss(some, columns))


@dataclass(frozen=True, kw_only=True, eq=False)
class TrunkCurve:
    """Held-out losses of one run before its learning rate decayed."""

    run_id: str
    n_params: float
    """Counted as the fit counts."""
    tokens: Array
    losses: Array
    horizon_tokens: float | None = None
    """Where its schedule ends, if the rate on the way depends on that (cosine); None at constant rate (a WSD trunk)."""

    @property
    def place(self) -> Array:
        """What makes two curves comparable point by point: tokens, or for cosine the share of the schedule."""
        return self.tokens if self.horizon_tokens is None else self.tokens / self.horizon_tokens


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One loss of the run beside what the law leads to expect."""

    tokens: float
    loss_nats: float
    expected_nats: float
    band95: tuple[float, float]
    z: float
    """Distance in standard deviations of a single run's prediction."""

    @property
    def side(self) -> int:
        """1 above the band, -1 below it, 0 inside."""
        return int(self.loss_nats > self.band95[1]) - int(self.loss_nats < self.band95[0])


@dataclass(frozen=True, kw_only=True)
class LawCheck:
    """Whether one run is on the law."""

    run_id: str
    verdict: Verdict
    since_tokens: float | None
    """First of the points outside the band without a break until now; None while it is inside."""
    z: float | None
    """At the last judged point."""
    off_frac: float | None
    """loss / expected - 1 at the last judged point."""
    points: tuple[Judged, ...]
    sentence: str
    notes: tuple[str, ...] = ()


def check_curve(
    curve: TrunkCurve, joint: JointLaw, finished: Sequence[TrunkCurve] = (), *, warmup_tokens: float = 0.0
) -> LawCheck:
    """Whether a running run's validation curve is on the law.

    The band holds the law's draws, the scatter of runs and what the finished trunks disagree about. Each draw has its
    own gap, so that an error which the law makes for this run and for the finished ones alike cancels.

    Args:
        curve: of the run in question, before decay.
        finished: the same of runs that have finished rows, under the same schedule.
        warmup_tokens: losses before it are not judged.
    """
    same = [
        one
        for one in finished
        if one.run_id != curve.run_id and (one.horizon_tokens is None) == (curve.horizon_tokens is None)
    ]
    same = [one for one in same if len(one.tokens) > 1]
    if not same:
        why = "no finished run has a validation curve of its trunk, so what a loss before decay should be is not known"
        return _silent(curve.run_id, f"only decayed losses can be judged: {why}")
    if len(curve.tokens) == 0:
        return _silent(curve.run_id, "it has no validation curve yet")
    judged = []
    for index, place in enumerate(curve.place):
        beside = [one for one in same if one.place[0] <= place <= one.place[-1]]
        if curve.tokens[index] > warmup_tokens and beside:
            judged.append(_judge_undecayed(curve, index, beside, joint))
    if not judged:
        return _silent(curve.run_id, "no finished run was measured at the tokens it has reached")
    notes = [f"its expected gap to the law of finished runs is that of {_named([one.run_id for one in same])}"]
    if len(same) == 1:
        notes.append("one finished run says nothing about how gaps differ; the band rests on the scatter of the fit")
    return _conclude(curve, judged, joint, notes, in_a_row=IN_A_ROW)


def check_decayed(
    run_id: str,
    n_params: float,
    tokens: Sequence[float],
    losses: Sequence[float],
    joint: JointLaw,
    *,
    in_fit: bool = False,
) -> LawCheck:
    """Whether finished (decayed) losses of a run are on the law; each stands for itself.

    Args:
        in_fit: whether the law was fitted to them too, which pulls it towards them.
    """
    curve = TrunkCurve(run_id=run_id, n_params=n_params, tokens=np.array(tokens, float), losses=np.array(losses, float))
    if len(tokens) == 0:
        return _silent(run_id, "it has no decayed loss yet")
    centre, drawn = joint.logs(n_params, curve.tokens)
    spread = np.hypot(_width(drawn), joint.scatter)
    judged = [
        _judged(float(t), float(loss), float(c), float(s), _student(joint.spare))
        for t, loss, c, s in zip(curve.tokens, curve.losses, centre, spread, strict=True)
    ]
    notes = (
        ["the law was fitted to these losses too, so they are nearer to it than a new run would be"] if in_fit else []
    )
    return _conclude(curve, judged, joint, notes, in_a_row=1)


def _judge_undecayed(curve: TrunkCurve, index: int, beside: Sequence[TrunkCurve], joint: JointLaw) -> Judged:
    """One loss of the curve against the law plus the gap of the finished trunks at the same place."""
    tokens, place, loss = float(curve.tokens[index]), float(curve.place[index]), float(curve.losses[index])
    at = np.array([place * (one.horizon_tokens or 1.0) for one in beside])
    measured = np.array([np.interp(np.log(place), np.log(one.place), np.log(one.losses)) for one in beside])
    each = [joint.logs(one.n_params, at[i : i + 1]) for i, one in enumerate(beside)]
    law, law_draws = np.concatenate([e[0] for e in each]), np.concatenate([e[1] for e in each], axis=1)
    centre, drawn = joint.logs(curve.n_params, np.array([tokens]))
    gaps = measured - law
    best: tuple[float, float, float] | None = None
    for weights, seen, dof in _smoothers(np.log([one.n_params for one in beside]), np.log(curve.n_params), gaps):
        noise, spare = max((seen, dof), (joint.scatter, joint.spare))
        unsure = _width(drawn[:, 0] - law_draws @ weights)
        spread = float(np.sqrt(unsure**2 + noise**2 * (1 + float(weights @ weights))))
        found = (float(centre[0] + weights @ gaps), spread, _student(spare))
        if best is None or found[1] * found[2] < best[1] * best[2]:
            best = found
    assert best is not None
    return _judged(tokens, loss, *best)


def _smoothers(x: Array, at: float, gaps: Array) -> list[tuple[Array, float, int]]:
    """(weights of the gaps, their residual standard deviation, its degrees of freedom): a mean; a line in log N."""
    k = len(x)
    mean = np.full(k, 1 / k)
    noise = float(gaps.std(ddof=1)) if k > 1 else 0.0
    found = [(mean, noise, max(1, k - 1))]
    off = x - x.mean()
    if k >= FEW_FOR_TREND and float(off @ off) > 0:
        weights = mean + (at - x.mean()) * off / float(off @ off)
        slope = float(off @ gaps) / float(off @ off)
        rest = gaps - gaps.mean() - slope * off
        found.append((weights, float(np.sqrt(rest @ rest / (k - 2))), k - 2))
    return found


def _width(draws: Array) -> float | Array:
    """Standard deviation of draws (R, ...) from their middle 68 %, which a few wild ones do not move; 0 without any."""
    if len(draws) < 2:
        return np.zeros(draws.shape[1:]) if draws.ndim > 1 else 0.0
    low, high = np.nanquantile(draws, (0.1587, 0.8413), axis=0)
    wide = np.asarray((high - low) / 2)
    return wide if draws.ndim > 1 else float(wide)


def _student(spare: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(spare, 0.975))


def _judged(tokens: float, loss: float, centre: float, spread: float, student: float) -> Judged:
    spread = max(spread, 1e-9)
    return Judged(
        tokens=tokens,
        loss_nats=loss,
        expected_nats=float(np.exp(centre)),
        band95=(float(np.exp(centre - student * spread)), float(np.exp(centre + student * spread))),
        z=float((np.log(loss) - centre) / spread),
    )


def _silent(run_id: str, sentence: str) -> LawCheck:
    return LawCheck(
        run_id=run_id,
        verdict="cannot be judged",
        since_tokens=None,
        z=None,
        off_frac=None,
        points=(),
        sentence=sentence,
    )


def _conclude(
    curve: TrunkCurve, judged: Sequence[Judged], joint: JointLaw, notes: Sequence[str], *, in_a_row: int
) -> LawCheck:
    last = judged[-1]
    streak = 0
    while streak < len(judged) and judged[-1 - streak].side == last.side:
        streak += 1
    off = last.loss_nats / last.expected_nats - 1
    since = judged[-streak].tokens if last.side else None
    verdict: Verdict = "on the law"
    if last.side:
        verdict = "not clear yet" if streak < in_a_row else "above the law" if last.side > 0 else "below the law"
    check = LawCheck(
        run_id=curve.run_id,
        verdict=verdict,
        since_tokens=since,
        z=last.z,
        off_frac=off,
        points=tuple(judged),
        sentence="",
        notes=(*notes, *_reach(curve, judged, joint)),
    )
    return replace(check, sentence=_sentence(check, streak, in_a_row))


def _sentence(check: LawCheck, streak: int, in_a_row: int) -> str:
    last, off = check.points[-1], check.off_frac or 0.0
    side = "above" if off >= 0 else "below"
    half = 50 * (last.band95[1] - last.band95[0]) / last.expected_nats
    now = (
        f"at {short(last.tokens)} tokens its loss {last.loss_nats:.3f} is {abs(100 * off):.1f} % {side} the expected "
        f"{last.expected_nats:.3f} (band ± {half:.1f} %, z = {last.z:+.1f})"
    )
    if check.verdict == "on the law":
        return f"on the law: {now}{_wandered(check.points, in_a_row)}"
    if check.verdict == "not clear yet":
        return f"not clear yet: {now}, outside the band for {streak} of the {in_a_row} points it takes"
    look = (
        "look at its learning rate, its batch and its data before spending the rest of its budget"
        if last.side > 0
        else "lower than a law of this text allows: look for held-out text in training, or another text or count of N"
    )
    return f"{check.verdict} since {short(check.since_tokens or 0)} tokens: {now}; {look}"


def _wandered(points: Sequence[Judged], in_a_row: int) -> str:
    """An earlier stretch outside the band, if there was one."""
    longest: list[Judged] = []
    stretch: list[Judged] = []
    for one in points:
        stretch = (
            [*stretch, one] if one.side and (not stretch or stretch[-1].side == one.side) else [one][: abs(one.side)]
        )
        longest = max(longest, stretch, key=len)
    if len(longest) < max(2, in_a_row):
        return ""
    where = "above" if longest[0].side > 0 else "below"
    return f"; it was {where} from {short(longest[0].tokens)} to {short(longest[-1].tokens)} tokens"


def _reach(curve: TrunkCurve, judged: Sequence[Judged], joint: JointLaw) -> list[str]:
    """How far outside the fitted range it is judged."""
    low, high = joint.fit.ranges["n_params"]
    n = max(curve.n_params / high, low / curve.n_params)
    d = judged[-1].tokens / joint.fit.ranges["n_tokens"][1]
    said = [f"N is x {n:.3g} outside the fitted sizes"] if n > 1.001 else []
    return [*said, *([f"D is x {d:.3g} beyond the fitted tokens"] if d > 1.001 else [])]


def _named(runs: list[str]) -> str:
    return listed(runs) if len(runs) <= 3 else f"{len(runs)} finished runs"
