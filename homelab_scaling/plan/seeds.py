"""Repeats of a ladder by its seeds: how many are asked for, and which ones a lab has already.

A repeat differs from a planned run by its seed alone (weights at the start, order of the text). Seeds are only ever
added: a lab goes on with every seed that it has, so that no run falls out of the fit because a flag was forgotten.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.words import listed
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.runs import RunFolder, run_folders
from homelab_scaling.specs import RunSpec, ScienceSpec

MAX_SEEDS = 1000
NAMED_RUNS = 3
"""So many run folders a message names."""


def with_seeds(ladder: Ladder, n_seeds: int) -> Ladder:
    """The ladder with so many seeds: the first of its own, then the smallest numbers that it does not have.

    Raises:
        SpecError: fewer than one, or more than anybody trains.
    """
    if not 1 <= n_seeds <= MAX_SEEDS:
        raise SpecError(f"--seeds {n_seeds}: wants how many seeds each rung is trained with, 1 to {MAX_SEEDS}")
    fresh = (seed for seed in range(n_seeds + len(ladder.seeds)) if seed not in ladder.seeds)
    more = [next(fresh) for _ in range(n_seeds - len(ladder.seeds))]
    return replace(ladder, seeds=(*ladder.seeds[:n_seeds], *more))


def plan_with_seeds(ladder: Ladder, lab: Path, planner: Callable[[Ladder], Plan], *, asked: bool = False) -> Plan:
    """The plan of a ladder, with the seeds that its lab has besides.

    Args:
        lab: LAB/<ladder>.
        asked: the ladder's seeds are what `--seeds` asked for, not what its file says.

    Raises:
        SpecError: fewer seeds were asked for than have begun.
    """
    plan = planner(ladder)
    repeats = repeats_in(lab, plan)
    if not asked:
        more = tuple(sorted({spec.science.seed for spec, _ in repeats}))
        return replace(planner(replace(ladder, seeds=(*ladder.seeds, *more))), lab_seeds=more) if more else plan
    begun = [spec for spec, folder in repeats if has_begun(folder)]
    if begun:
        seeds = sorted({spec.science.seed for spec in begun})
        named = [f"runs/{spec.run_id}" for spec in begun[:NAMED_RUNS]]
        named += [f"{len(begun) - NAMED_RUNS} more"] if len(begun) > NAMED_RUNS else []
        raise SpecError(
            f"--seeds {len(ladder.seeds)}, but {lab} has runs of other seeds too ({', '.join(map(str, seeds))}), which "
            f"would fall out of the fit; leave --seeds out to go on with all of them, or delete {listed(named)}"
        )
    return plan


def repeats_in(lab: Path, plan: Plan) -> list[tuple[RunSpec, RunFolder]]:
    """The runs of a lab that differ from a planned one by the seed alone, which is none of the plan's."""
    wanted = {(spec.rung, but_for_seed(spec.science)) for spec in plan.runs}
    found = []
    for folder in run_folders(lab) if (lab / "runs").is_dir() else ():
        if not folder.spec.exists():
            continue
        try:
            spec = folder.read_spec()
        except SpecError:
            continue  # read_runs lists it among the excluded
        if spec.science.seed not in plan.seeds and (spec.rung, but_for_seed(spec.science)) in wanted:
            found.append((spec, folder))
    return found


def but_for_seed(science: ScienceSpec) -> ScienceSpec:
    """The same for all repeats of a run."""
    return replace(science, seed=0)


def has_begun(folder: RunFolder) -> bool:
    """Whether there is more than the spec.json that was written before training."""
    return [path.name for path in folder.path.iterdir()] != [folder.spec.name]


def seeds_words(seeds: tuple[int, ...]) -> str:
    """`seed 0`, `3 seeds (0, 1, 2)`."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
