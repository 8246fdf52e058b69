"""Noise scales and advice that were never measured: planted laws, and the files that a ladder would have left."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from homelab_scaling import codec
from homelab_scaling.batch import advice, trials
from homelab_scaling.batch.branch_fit import Branch, BranchResult
from homelab_scaling.batch.calibration import calibrate, calibration_from_branch
from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.estimator import NoiseScale
from homelab_scaling.batch.table import Setting, measured_batch_rates
from homelab_scaling.box import Box
from homelab_scaling.ladder import Horizons, Ladder, Rung
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.specs import CorpusManifest, Money, RunSpec, ShardFile, Split

CPU = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=True)
SWEEP_BATCHES = (512, 1024, 2048, 4096, 8192)


def b_simple(tokens: float) -> float:
    """The planted noise scale: 6,000 tokens after a million, growing with the square root."""
    return 6000 * math.sqrt(tokens / 1e6)


def loss_after(tokens: float) -> float:
    return 1.9 + 700 * tokens**-0.39


def corpus(n_vocab: int = 2048) -> CorpusManifest:
    def split(name: str, n: int) -> Split:
        file = ShardFile(name=f"{name}.bin", n_tokens=n, sha256=name)
        return Split(files=(file,), n_tokens=n, n_bytes=4 * n, n_documents=1000)

    return CorpusManifest(
        tokenizer="bpe:2048",
        tokenizer_file="tokenizer.json",
        tokenizer_hash="t" * 64,
        n_vocab=n_vocab,
        eot_id=0,
        dtype="uint16",
        train=split("train", 10**10),
        val=split("val", 10**7),
        sources=("python",),
        held_out_rule="by content hash",
    )


def noise_lines(spec: RunSpec, *, n_windows: int = 12) -> list[dict[str, Any]]:
    """What a run of this spec writes into metrics.jsonl: a bound first, then numbers."""
    rng = np.random.default_rng(spec.science.shape.d_model)
    grown = (spec.science.shape.d_model / 24) ** 0.2
    horizon, batch = spec.science.horizons_tokens[-1], spec.science.batch_tokens_global
    lines: list[dict[str, Any]] = []
    for i in range(1, n_windows + 1):
        tokens = round(horizon * i / n_windows) // batch * batch
        value = grown * b_simple(tokens) * math.exp(0.1 * float(rng.normal()))
        known = i > 1
        lines.append(
            {
                "kind": "noise",
                "update": tokens // batch - 1,
                "phase": "trunk" if i <= 0.8 * n_windows else f"decay@{horizon}",
                "step": tokens // batch - 1,
                "tokens": tokens,
                "loss": loss_after(tokens) / grown**0.5,
                "batch_tokens": batch,
                "noise_scale_tokens": value if known else None,
                "noise_low_tokens": value / 1.25 if known else None,
                "noise_high_tokens": value * 1.3 if known else None,
                "noise_at_least_tokens": None if known else value / 2,
                "why": None if known else "its interval reaches zero",
                "n_steps": 16,
                "k": 8,
                "microbatch_seqs": 4,
            }
        )
    return lines


def probe_points(n_params: int, horizon: int, context: int) -> tuple[NoiseScale, ...]:
    """Three windows of a probe's burn-in."""
    points = []
    for share in (0.05, 0.1, 0.2):
        tokens = round(share * horizon)
        value = b_simple(tokens)
        points.append(
            NoiseScale(
                b_simple_seqs=value / context,
                b_simple_tokens=value,
                ci95_tokens=(value / 1.2, value * 1.22),
                at_least_tokens=None,
                why_no_number=None,
                grad_sq=1.0,
                trace=value / context,
                loss_nats=loss_after(tokens),
                tokens_trained=tokens,
                n_params=n_params,
                context_tokens=context,
                n_steps=60,
                k=8,
                microbatch_seqs=2,
            )
        )
    return tuple(points)


def sweep_result(rung: str, b_crit: float = 2400.0, s_min: float = 130.0) -> trials.SweepResult:
    """Trials on the hyperbola, the middle rate the fastest."""
    found = []
    for i, batch in enumerate(SWEEP_BATCHES):
        best = s_min * (1 + b_crit / batch) * (1 + 0.01 * (-1) ** i)
        for rate, slower in ((0.5, 1.3), (1.0, 1.0), (2.0, 1.5)):
            why = "diverged" if rate == 2.0 and batch == 512 else None
            found.append(
                trials.Trial(
                    run_id=f"{rung}-{batch}-{rate:g}",
                    batch_tokens=batch,
                    lr_peak=rate * 2e-3 * math.sqrt(batch / 2048),
                    n_steps=None if why else best * slower,
                    why_not=why,
                )
            )
    return trials.summarise(found, rung=rung, target_nats=4.61, target_tokens=2048 * 282, edges=[8192])


def branch_result(rung: str, b_crit: float = 2400.0) -> BranchResult:
    """Branches that came exactly where the hyperbola says, with a reference falling by .1 nats a doubling."""
    first, delta, branches = 512, 300_000, []
    for batch in SWEEP_BATCHES:
        ratio = (1 + batch / b_crit) / (1 + first / b_crit)
        loss = 4.9 - 0.2 * math.log2(1 + 2 / ratio)
        branches.append(
            Branch(
                run_id=f"{rung}-{batch}",
                batch_tokens=batch,
                lr=2e-3 * math.sqrt(batch / 2048),
                loss_nats=loss,
                sd_nats=0.002,
                expected_nats=loss,
                token_ratio=ratio,
            )
        )
    return BranchResult(
        rung=rung,
        plan_hash="0" * 16,
        base_tokens=2048,
        start_tokens=600_000,
        delta_tokens=delta,
        start_nats=4.9,
        branches=tuple(branches),
        b_crit=Estimate(value=b_crit, low=b_crit / 1.4, high=b_crit * 1.5),
        at_least_tokens=None,
        at_most_tokens=None,
        why_no_number=None,
        misfit=1.1,
        merrill_tokens=1024,
        merrill_is_last=False,
        tolerance_nats=0.01,
        flops=1e12,
        seconds=40.0,
        kwh=None,
        notes=(),
    )


def make_advice(
    shapes: dict[str, tuple[int, int, int]],
    lab: Path,
    *,
    horizons: dict[str, int] | None = None,
    context: int = 128,
    sweep: bool = True,
    branch: bool = False,
    unmeasured: tuple[str, ...] = (),
) -> advice.BatchAdvice:
    """Advice for these rungs and writes batch.json; the smallest calibrates where there is a sweep.

    Args:
        horizons: by rung, where they differ.
        unmeasured: rungs that get a forecast.
    """
    measured, settings = {}, []
    for name, (n_layer, d_model, n_head) in shapes.items():
        tokens = (horizons or {}).get(name, 2_998_272)
        ladder = Ladder(
            name=lab.name,
            rungs=(Rung(name=name, n_layer=n_layer, d_model=d_model, n_head=n_head),),
            context_tokens=context,
            horizons=Horizons(tokens=(tokens,)),
            money=Money(usd_per_kwh=0.2, usd_per_machine_hour=0.05, watts=90.0),
        )
        plan = plan_ladder(ladder, corpus(), CPU)
        settings.append(
            Setting(
                rung=plan.rungs[0],
                n_vocab=plan.n_vocab,
                box=CPU,
                ladder=ladder,
                rates=measured_batch_rates([lab]),
            )
        )
        if name not in unmeasured:
            n_params = plan.rungs[0].size.n_params
            middle = b_simple(tokens / 2) * (n_params / 5e4) ** 0.1
            measured[name] = advice.Measured(
                b_simple=Estimate(value=middle, low=middle / 1.3, high=middle * 1.3),
                why_no_number=None,
                loss_nats=loss_after(tokens / 2) - 0.4 * math.log10(n_params / 5e4),
                points=probe_points(n_params, tokens, context),
            )
    first = next(iter(shapes))
    own = measured[first].b_simple
    assert own is not None
    swept = sweep_result(first) if sweep else None
    tested = branch_result(first) if branch else None
    c = calibrate(swept.trade_off, own, first) if swept else None
    if tested is not None:
        c = calibration_from_branch(tested, own, first)
    found = advice.advise(
        settings,
        measured,
        ladder=lab.name,
        data_id="0123456789ab",  # as the rows have it
        calibration=c,
        sweep=swept,
        branch=tested,
    )
    advice.write_advice(lab, found)
    return found


def add_noise(lab: Path, rung: str) -> None:
    """Noise lines for every run of a rung, and the doublings of its batch where that warms up."""
    for path in sorted((lab / "runs").glob(f"{rung}-*")):
        spec = codec.read_json(path / "spec.json", RunSpec)
        codec.append_jsonl(path / "metrics.jsonl", noise_lines(spec))
        if spec.science.batch_warmup is None:
            continue
        batch, tokens, events = spec.science.batch_warmup.from_tokens, spec.science.horizons_tokens[-1] // 20, []
        while batch < spec.science.batch_tokens_global:
            batch *= 2
            events.append({"kind": "batch", "update": 1, "step": 1, "tokens": tokens, "batch_tokens": batch})
            tokens *= 4
        codec.append_jsonl(path / "events.jsonl", events)
