"""A ladder that was planned and never trained: every planned run's folder with the losses of a given law."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.result import save_fit
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.runs import Machine, Row, RunRecord, read_runs, write_runs_csv
from homelab_scaling.specs import CorpusManifest, RunSpec, ShardFile, Split

MACHINE = Machine(
    device="cpu",
    n_processes=1,
    torch="2.13.0+cpu",
    accelerate="1.15.0",
    transformers="5.23.0",
    python="3.11.9",
    homelab_scaling="0.1.0",
)


def split(name: str, n_tokens: int) -> Split:
    file = ShardFile(name=f"{name}.bin", n_tokens=n_tokens, sha256=name)
    return Split(files=(file,), n_tokens=n_tokens, n_bytes=4 * n_tokens, n_documents=1000)


def manifest(tokenizer: str, n_vocab: int) -> CorpusManifest:
    return CorpusManifest(
        tokenizer=tokenizer,
        tokenizer_file=None,
        tokenizer_hash="a" * 64,
        n_vocab=n_vocab,
        eot_id=0,
        dtype="uint16",
        train=split("train", 10**12),
        val=split("val", 10**7),
        sources=("planted",),
        held_out_rule="by content hash",
    )


def plant(
    lab: Path,
    ladder: Ladder,
    law: Callable[[float, float], float],
    *,
    n_vocab: int = 50_257,
    noise: float = 0.0,
    diverged: Collection[str] = (),
    missing: Collection[str] = (),
    box: Box | None = None,
) -> None:
    """Writes plan.json and the folder of every planned run.

    Args:
        law: loss in nats at N (all parameters) and D.
        noise: standard deviation of log loss, shared by the rows of a run.
        diverged, missing: rungs that ended so, or that never began.
    """
    corpus = manifest(ladder.data.tokenizer, n_vocab)
    plan = plan_ladder(ladder, corpus, box or box_with("RTX 4080", 2))
    lab.mkdir(parents=True, exist_ok=True)
    codec.write_json(lab / "plan.json", plan)
    rng = np.random.default_rng(0)
    for spec in plan.runs:
        if spec.rung in missing:
            continue
        off = float(noise * rng.normal())
        ended = "diverged" if spec.rung in diverged else "finished"
        rows = () if ended == "diverged" else tuple(_row(spec, law, off, d) for d in spec.science.horizons_tokens)
        record = RunRecord(
            run_id=spec.run_id,
            ladder=spec.ladder,
            rung=spec.rung,
            status=ended,  # type: ignore[arg-type]
            reason="the loss was no number at step 7" if ended == "diverged" else None,
            science_hash=spec.science.hash,
            rows=rows,
            machine=MACHINE,
        )
        folder = lab / "runs" / spec.run_id
        codec.write_json(folder / "spec.json", spec, durable=False)
        codec.write_json(folder / "record.json", record, durable=False)
    write_runs_csv(lab)


def _row(spec: RunSpec, law: Callable[[float, float], float], off: float, d: int) -> Row:
    science = spec.science
    params, rate = count_params(science.shape, science.n_vocab), flops_per_token(science.shape, science.n_vocab)
    return Row(
        row_id=f"{spec.run_id}@{d}",
        run_id=spec.run_id,
        rung=spec.rung,
        seed=science.seed,
        n_params=params.n_params,
        n_tokens=d,
        loss_nats=law(params.n_params, d) * float(np.exp(off)),
        loss_se_nats=None,
        bpb=None,
        flops=rate * d,
        flops_marginal=rate * d,
        n_body=params.n_body,
        n_pos=params.n_pos,
        n_embed=params.n_embed,
        n_head=params.n_head,
        n_steps=d // science.batch_tokens_global,
        batch_tokens=science.batch_tokens_global,
        lr_peak=science.schedule.lr_peak,
        schedule=science.schedule.name,
        decayed=True,
        optimizer=science.optim.name,
        precision=science.precision,
        data_id="planted",
        n_tokens_unique=d,
        seconds=rate * d / 1e13,
        seconds_marginal=rate * d / 1e13,
        tokens_per_s=1e13 / rate,
        mfu_frac=None,
        usd=rate * d / 1e13 * 0.15 / 3600,
        usd_marginal=rate * d / 1e13 * 0.15 / 3600,
    )


def fit_lab(lab: Path, *, n_bootstrap: int = 200, laws: Sequence[str] = ()) -> None:
    """What `homelab run` does before its report; naming laws leaves the evidence out."""
    points, excluded = read_runs(lab)
    save_fit(fit_points(points, excluded, laws=laws, source=lab.name, n_bootstrap=n_bootstrap), lab / "fit")
