"""What a reader must know before believing a score, in sentences; only what changes its meaning is said."""

from homelab_scaling.evals.results import Score

FEW_DOCUMENTS = 100
"""Below it the 95 % interval of a share is wider than +/- 8 to 10 points."""
LARGE_OVERLAP_FRAC, SOME_OVERLAP_FRAC = 0.25, 0.02
"""Said from the first on, and from the second on where the clean part scores worse than chance alone would have it."""
MANY_UNKNOWN_FRAC = 0.2
_EXACT = ("exact_match", "em")


def cautions(score: Score) -> tuple[str, ...]:
    """The sentences for one score."""
    found = (_chance(score), _few(score), _overlap(score), _overlap_unknown(score), _exact_match(score))
    return tuple(sentence for sentence in found if sentence is not None)


def _chance(score: Score) -> str | None:
    part, chance = score.whole, score.chance
    if chance is None or part.low is None or part.high is None:
        return None
    interval = f"the interval is {part.low:.3g} to {part.high:.3g}"
    if part.low <= chance <= part.high:
        return f"not distinguishable from guessing ({chance:.3g}): {interval}"
    if (part.low > chance) == score.higher_is_better:
        return None
    # One sound score in forty lies below its interval: a mistake is suspected at twice the distance only.
    is_far = chance > 2 * part.high - part.low if score.higher_is_better else chance < 2 * part.low - part.high
    said = "worse than guessing" if is_far else "not better than guessing"
    return f"{said} ({chance:.3g}): {interval}{'; look for a wrong template or tokenizer' if is_far else ''}"


def _few(score: Score) -> str | None:
    n = score.whole.n_documents
    if n >= FEW_DOCUMENTS:
        return None
    if score.whole.low is None or score.whole.high is None:
        return f"{n} document{'s' if n != 1 else ''}: no interval can be given"
    half = (score.whole.high - score.whole.low) / 2
    return f"only {n} documents: +/- {half:.2g}; tell models apart by their paired differences, not by these intervals"


def _overlap(score: Score) -> str | None:
    frac = score.overlap_frac
    if frac is None or frac < (SOME_OVERLAP_FRAC if _differ(score) else LARGE_OVERLAP_FRAC):
        return None
    said = f"{frac:.0%} of the documents overlap with the training text (13-grams)"
    if score.clean is None or score.clean.score is None:
        return f"{said}, and no clean part is left"
    if _differ(score):
        return f"{said}: believe the clean part, {score.clean.score:.4g} on {score.clean.n_documents} documents"
    return f"{said}; the clean part ({score.clean.n_documents} documents) scores {score.clean.score:.4g}"


def _differ(score: Score) -> bool:
    """The clean part's interval leaves the whole's score out, on the worse side."""
    whole, clean = score.whole.score, score.clean
    if whole is None or clean is None or clean.low is None or clean.high is None:
        return False
    return clean.high < whole if score.higher_is_better else clean.low > whole


def _overlap_unknown(score: Score) -> str | None:
    if score.overlap_unknown is None:
        return None
    if score.overlap_frac is None:
        return f"contamination unknown: {score.overlap_unknown}"
    n = score.whole.n_documents
    n_known = (
        0 if score.clean is None or score.overlap_frac == 1 else score.clean.n_documents / (1 - score.overlap_frac)
    )
    return f"contamination partly unknown: {score.overlap_unknown}" if n_known < (1 - MANY_UNKNOWN_FRAC) * n else None


def _exact_match(score: Score) -> str | None:
    metric = score.metric.lower()
    if not any(metric == name or metric.startswith(f"{name}_") or metric.startswith(f"{name},") for name in _EXACT):
        return None
    return "exact match undercounts: a right answer in other words or another form is wrong here"
