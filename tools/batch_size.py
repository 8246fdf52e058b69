"""Measures the gradient noise scale of each rung; advises batch, split and learning rate, with what each would cost.

Says first how many steps the measurement takes and how long. What was measured is frozen in LAB/LADDER/batch.json,
which `homelab plan` and `homelab run` follow wherever the ladder gives no batch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError, UserError

if TYPE_CHECKING:
    from homelab_scaling.batch.advice import Calibration, Measured
    from homelab_scaling.batch.probe import ProbePlan
    from homelab_scaling.batch.table import Setting
    from homelab_scaling.batch.trials import SweepResult
    from homelab_scaling.batch.verify import SweepPlan
    from homelab_scaling.specs import CorpusManifest
    from homelab_scaling.sweep.prepare import Experiment

TABLE_COLUMNS = 100
"""Narrower, the tables would break their numbers."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which ladder, what to measure, what the advice may cost."""

    ladder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LADDER")]
    """A ladder file, or the name of a shipped one such as quickstart."""
    lab: Path = Path("lab")
    """The folder that holds the labs; shards and batch.json are in LAB/<ladder's name>."""
    rungs: tuple[str, ...] = ()
    """Measure only these; the others get a forecast from them. All when not given."""
    burn_in: float = 0.2
    """Share of the longest horizon that a probe trains to measure on."""
    again: bool = False
    """Measure anew what batch.json holds already."""
    verify: bool = False
    """Train the smallest rung at five batches over a factor of 16, rates tuned for each; calibrate all by it."""
    overhead: float = 0.2
    """Share of tokens above those of a small batch that the advice may spend."""
    beta2: bool = False
    """Advise a beta2, too, that forgets after as many tokens as the ladder's does at its own batch."""
    watts: float | None = None
    """Power of the whole machine under load, for kWh and money; else as `homelab plan` finds it."""
    dry_run: bool = False
    """Say what would be measured, how long it takes and what published work would take; write nothing."""
    json: bool = False
    """Print batch.json (with --dry-run the plan of the measurement) as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.sweep.prepare import ensure_corpus, existing_corpus, open_experiment

    if not 0 < args.overhead <= 1:
        raise UserError(f"--overhead {args.overhead:g}: wants a share of tokens, more than 0 and at most 1")
    if args.watts is not None and args.watts <= 0:
        raise UserError(f"--watts {args.watts:g}: wants the power of the machine under load, a positive number")
    experiment = open_experiment(args.ladder, args.lab)
    names = [r.name for r in experiment.ladder.rungs]
    unknown = [name for name in args.rungs if name not in names]
    if unknown:
        raise SpecError(f"{experiment.ladder_file.name} has no rung {unknown[0]!r}; its rungs are {', '.join(names)}")
    if args.dry_run:
        return _Session(args, experiment, existing_corpus(experiment)).dry_run()
    with experiment.lock():
        return _Session(args, experiment, ensure_corpus(experiment)).run()


class _Session:
    """What is known of a ladder, what is to be measured, and what follows."""

    def __init__(self, args: Args, experiment: "Experiment", corpus: "CorpusManifest | None") -> None:
        from homelab_scaling.batch.advice import begun_rungs, read_advice
        from homelab_scaling.batch.measure import assumed_corpus
        from homelab_scaling.batch.table import Setting
        from homelab_scaling.plan.cost import measured_rates
        from homelab_scaling.sweep.prepare import make_plan

        self.args, self.experiment, self.lab = args, experiment, experiment.lab
        self.no_text = corpus is None
        if corpus is None:
            corpus = assumed_corpus(experiment.ladder, make_plan(experiment, None, advised=False).n_vocab)
        # As the ladder alone has it: what is measured must not depend on what was advised before.
        self.plan = make_plan(experiment, corpus, advised=False)
        found = read_advice(self.lab)
        self.previous = found if found is not None and found.data_id == self.plan.data_id else None
        powers = measured_rates([self.lab])
        self.settings = [
            Setting(
                rung=rung,
                n_vocab=self.plan.n_vocab,
                box=experiment.box,
                ladder=experiment.ladder,
                measured=powers,
                watts=args.watts,
            )
            for rung in self.plan.rungs
        ]
        self.begun = begun_rungs(self.lab)
        self.known = self._known()

    def _known(self) -> "dict[str, Measured]":
        """Measurements of batch.json that still hold."""
        if self.previous is None:
            return {}
        shapes = {s.rung.name: s.shape for s in self.settings}
        anew = (self.args.rungs or tuple(shapes)) if self.args.again else ()
        found = {r.rung: (r.measured, r.shape) for r in self.previous.rungs if r.rung not in anew}
        return {
            name: measured
            for name, (measured, shape) in found.items()
            if measured is not None and measured.b_simple is not None and shapes.get(name) == shape
        }

    @property
    def smallest(self) -> "Setting":
        return min(self.settings, key=lambda s: s.rung.size.n_params)

    def probes(self) -> "list[ProbePlan]":
        """What is still to be measured; with --verify the smallest rung is always among what is known or measured."""
        from homelab_scaling.batch.measure import longest_run
        from homelab_scaling.batch.probe import plan_probe

        wanted = set(self.args.rungs or (s.rung.name for s in self.settings))
        if self.args.verify:
            wanted.add(self.smallest.rung.name)
        names = [s.rung.name for s in self.settings if s.rung.name in wanted and s.rung.name not in self.known]
        box = self.experiment.box
        return [plan_probe(longest_run(self.plan, name), burn_in_frac=self.args.burn_in, box=box) for name in names]

    def sweep_plan(self, b_crit_tokens: float) -> "SweepPlan":
        from homelab_scaling.batch.advice import base_batch, lr_scale
        from homelab_scaling.batch.measure import longest_run
        from homelab_scaling.batch.verify import plan_sweep
        from homelab_scaling.plan import rules

        setting = self.smallest
        written = next(r for r in self.experiment.ladder.rungs if r.name == setting.rung.name)
        n_body = setting.rung.size.params.n_body
        rule = rules.choose_lr(written, self.experiment.ladder.lr, n_body, setting.horizon_tokens).value
        return plan_sweep(
            setting,
            longest_run(self.plan, setting.rung.name),
            self.lab,
            self.experiment.shards,
            b_crit_tokens=b_crit_tokens,
            lr_middle=lambda batch: rule * lr_scale(batch, base_batch(setting), max(batch, base_batch(setting))),
        )

    # ------------------------------------------------------------------------------------------------------- dry run

    def dry_run(self) -> int:
        from homelab_scaling.batch.page import dry_page
        from homelab_scaling.batch.priors import priors_for
        from homelab_scaling.plan.rules import step_law_batch

        probes = self.probes()
        # Nothing is measured yet: a sweep would be laid about the batch that Step Law has for the rung.
        sweep = self.sweep_plan(step_law_batch(self.smallest.horizon_tokens)) if self.args.verify else None
        priors = {
            s.rung.name: priors_for(
                n_params=s.rung.size.n_params,
                n_body=s.rung.size.params.n_body,
                n_tokens=s.horizon_tokens,
                context_tokens=s.shape.context_tokens,
            )
            for s in self.settings
        }
        if self.args.json:
            document = {"probes": codec.to_plain(tuple(probes)), "sweep": sweep.words if sweep else None}
            print(codec.dumps(document | {"priors": codec.to_plain(priors)}))
            return 0
        said = ["no shards yet: they are built first"] if self.no_text else []
        _print(dry_page(probes, sweep, priors, [*said, *self._kept()]))
        return 0

    def _kept(self) -> list[str]:
        """What is not measured again, in words."""
        said = []
        if self.known:
            said.append(f"measured before and kept: {', '.join(self.known)} (--again measures anew)")
        if kept := sorted(self.begun & {r.rung for r in (self.previous.rungs if self.previous else ())}):
            said.append(f"training has begun, so the batch stays as it was advised: {', '.join(kept)}")
        return said

    # ----------------------------------------------------------------------------------------------------------- run

    def run(self) -> int:
        from homelab_scaling.batch.advice import advise, write_advice
        from homelab_scaling.batch.measure import bill_of, measured_from, run_probes
        from homelab_scaling.batch.page import advice_page
        from homelab_scaling.batch.table import measured_batch_rates
        from homelab_scaling.plan.show import duration, flops

        for line in self._kept():
            _say(line)
        probes = self.probes()
        if probes:
            bill = bill_of(probes)
            names = ", ".join(p.rung for p in probes)
            _say(f"to measure: {names}; {flops(bill.flops)} FLOPs, about {duration(bill.seconds)}")
        results = run_probes(
            probes,
            lab=self.lab,
            shards=self.experiment.shards,
            box=self.experiment.box,
            again=self.args.again,
            say=_say,
        )
        for result in results:
            _say(f"{result.rung}: {result.middle.words}")
        measured = self.known | {result.rung: measured_from(result) for result in results}
        calibration, sweep = self._calibration(measured)
        rates = measured_batch_rates([self.lab, self.lab / "batch_sweep"])
        advice = advise(
            [replace(setting, rates=rates) for setting in self.settings],
            measured,
            ladder=self.experiment.ladder.name,
            data_id=self.plan.data_id or "",
            calibration=calibration,
            sweep=sweep,
            previous=self.previous,
            begun=self.begun,
            rescale_beta2=self.args.beta2,
            overhead_max_frac=self.args.overhead,
        )
        path = write_advice(self.lab, advice)
        if self.args.json:
            print(codec.dumps(codec.to_plain(advice)))
            return 0
        _print(advice_page(advice, self._planned()))
        _say(f"written: {path}")
        return 0

    def _planned(self) -> dict[str, tuple[int, str]]:
        """What a run would train with if nothing was advised, and who says so."""
        return {r.name: (r.training.batch_tokens, r.training.batch_source) for r in self.plan.rungs}

    def _calibration(self, measured: "dict[str, Measured]") -> "tuple[Calibration | None, SweepResult | None]":
        """c from a sweep now, or from one that batch.json holds."""
        from homelab_scaling.batch.advice import calibrate
        from homelab_scaling.batch.measure import b_simple_at_middle
        from homelab_scaling.batch.verify import run_sweep

        if not self.args.verify:
            return (self.previous.calibration, self.previous.sweep) if self.previous else (None, None)
        name = self.smallest.rung.name
        known = measured[name]
        if known.b_simple is None:
            raise SpecError(
                f"rung {name}: its noise scale is not known ({known.why_no_number}), so a sweep has nothing to "
                "calibrate; measure longer with a larger --burn-in"
            )
        # Where training is short the noise scale is smaller than at the middle of the whole run.
        target = self.smallest.rung.training.horizons[0].tokens // 2
        about = b_simple_at_middle(known.points, target) or known.b_simple
        plan = self.sweep_plan(about.value)
        _say(plan.words)
        sweep = run_sweep(plan, self.experiment.lab.parent, _say)
        here = b_simple_at_middle(known.points, sweep.target_tokens) or known.b_simple
        return calibrate(sweep.trade_off, here, name), sweep


def _print(parts: Sequence[object]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=max(TABLE_COLUMNS, Console().width))
    for part in parts:
        console.print(part)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["batch-size", *sys.argv[1:]]))
