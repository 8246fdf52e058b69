"""Probes that need no training: every rung has the noise scale of a table, or none."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.batch.estimator import NoiseScale
from homelab_scaling.batch.midrun import middle_of_run
from homelab_scaling.batch.probe import ProbePlan, ProbeResult, result_path
from homelab_scaling.runs import Machine

LADDER = """
name = "mini"
context_tokens = 32
rungs = [
    { name = "a", n_layer = 1, d_model = 16, n_head = 1 },
    { name = "b", n_layer = 2, d_model = 32, n_head = 2 },
    { name = "c", n_layer = 2, d_model = 64, n_head = 2 },
]
[data]
sources = ["text"]
tokenizer = "bytes"
val_frac = 0.1
max_epochs = 20
[horizons]
tokens = [100_000, 200_000]
[lr]
peak = 1e-2
[validation]
full_tokens = 8_192
curve_tokens = 1_024
[money]
usd_per_machine_hour = 0.05
[batch]
calibrate = "none"
"""


def write_ladder(folder: Path) -> Path:
    """A ladder without a batch over some of the standard library's own text."""
    text = folder / "text"
    text.mkdir()
    for module in ("argparse", "ast", "codecs", "decimal", "enum", "inspect", "os", "re", "typing", "pathlib"):
        source = Path(getattr(sys.modules.get(module), "__file__", None) or "")
        if source.suffix == ".py":
            (text / f"{module}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    path = folder / "mini.toml"
    path.write_text(LADDER)
    return path


MACHINE = Machine(device="cpu", n_processes=1, torch="", accelerate="", transformers="", python="", homelab_scaling="")


class Probes:
    """Stands for the launch of the probes: every rung has the noise scale of its table, or none."""

    def __init__(self, at_end: dict[str, float | None]) -> None:
        self.at_end = at_end
        self.launched: list[str] = []

    def __call__(self, recipe: str, arguments: Sequence[str], **_: Any) -> int:
        assert recipe == "noise_probe" and arguments[0] == "--probe"
        for path in map(Path, arguments[1:]):
            plan = codec.read_json(path, ProbePlan)
            assert Path(plan.spec.shards).is_absolute()
            self.launched.append(plan.rung)
            codec.write_json(result_path(path.parents[2], plan.rung), self.result(plan))
        return 0

    def result(self, plan: ProbePlan) -> ProbeResult:
        points = tuple(self.point(plan, share) for share in (0.25, 0.5, 1.0))
        return ProbeResult(
            rung=plan.rung,
            probe_hash=plan.hash,
            science_hash=plan.spec.science.hash,
            data_id="x",
            horizon_tokens=plan.horizon_tokens,
            points=points,
            middle=middle_of_run(points, horizon_tokens=plan.horizon_tokens),
            unigram_nats=5.0,
            overhead_frac=0.02,
            every_steps=1,
            burn_in_tokens=plan.burn_in_tokens,
            flops=plan.flops,
            seconds=3.0,
            kwh=None,
            machine=MACHINE,
        )

    def point(self, plan: ProbePlan, share: float) -> NoiseScale:
        value, context = self.at_end[plan.rung], plan.spec.science.shape.context_tokens
        tokens = None if value is None else value * share**0.5
        return NoiseScale(
            b_simple_seqs=None if tokens is None else tokens / context,
            b_simple_tokens=tokens,
            ci95_tokens=None if tokens is None else (tokens / 1.2, tokens * 1.2),
            at_least_tokens=700.0 if tokens is None else None,
            why_no_number=None if tokens is not None else "|G|^2 is not significantly above zero in 9 steps",
            grad_sq=0.01,
            trace=1.0,
            loss_nats=(4.0 - 0.4 * "abc".index(plan.rung)) * share**-0.1,
            tokens_trained=round(plan.burn_in_tokens * share),
            n_params=1000,
            context_tokens=context,
            n_steps=30,
            k=8,
            microbatch_seqs=1,
        )
