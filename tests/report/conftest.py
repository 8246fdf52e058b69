"""A lab that was never trained: a planted law with noise, and the files a real ladder would have left."""

import math
from pathlib import Path

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.runs import Machine, Row, RunRecord
from homelab_scaling.specs import (
    BatchWarmup,
    ExecutionSpec,
    ModelShape,
    Money,
    Optim,
    RunSpec,
    Schedule,
    ScienceSpec,
    make_run_id,
)

SHAPES = {"67k": (2, 24, 2), "127k": (2, 40, 2), "289k": (3, 64, 2), "545k": (3, 96, 3), "1072k": (4, 128, 4)}
BIG_SHAPES = {"5M": (6, 256, 4), "26M": (8, 512, 8), "101M": (12, 832, 8)}
HORIZONS = (749_568, 1_499_136, 2_998_272)
BATCH, VOCAB, CONTEXT = 4096, 2048, 128
MACHINE = Machine(
    device="cpu",
    n_processes=1,
    torch="2.13.0+cpu",
    accelerate="1.15.0",
    transformers="5.23.0",
    python="3.11.9",
    homelab_scaling="0.1.0",
    git_commit="0123abc",
)


def planted(n: float, d: float) -> float:
    return 1.9 + 40 * n**-0.31 + 700 * d**-0.39


class Synthetic:
    """Writes run folders under `lab`; `horizons`, `batch` and `batch_warmup` may be changed between runs."""

    def __init__(self, lab: Path, seed: int = 0) -> None:
        self.lab = lab
        self.horizons = HORIZONS
        self.batch = BATCH
        self.batch_warmup: BatchWarmup | None = None
        self.rng = np.random.default_rng(seed)

    def spec(self, rung: str, seed: int = 0) -> RunSpec:
        n_layer, d_model, n_head = (SHAPES | BIG_SHAPES)[rung]
        science = ScienceSpec(
            shape=ModelShape(n_layer=n_layer, d_model=d_model, n_head=n_head, context_tokens=CONTEXT),
            n_vocab=VOCAB,
            tokenizer_hash="t" * 64,
            train_fingerprint="a" * 64,
            val_fingerprint="b" * 64,
            horizons_tokens=self.horizons,
            batch_tokens_global=self.batch,
            schedule=Schedule(
                name="wsd",
                lr_peak=round(6e-3 * (d_model / 64) ** -0.5, 6),
                warmup_tokens=10 * self.batch,
                decay_frac=0.2,
                lr_final_frac=0.0,
            ),
            optim=Optim(),
            precision="fp32",
            seed=seed,
            val_tokens=131_072,
            batch_warmup=self.batch_warmup,
        )
        return RunSpec(
            run_id=make_run_id(rung, science),
            ladder=self.lab.name,
            rung=rung,
            science=science,
            execution=ExecutionSpec(),
            shards="../../shards",
            money=Money(usd_per_machine_hour=0.05),
        )

    def run(
        self,
        rung: str,
        status: str = "finished",
        reason: str | None = None,
        seed: int = 0,
        off: tuple[float, float] = (0.0, 0.0),
    ) -> RunSpec:
        """One run folder: spec, metrics of trunk and decays, record.

        Args:
            off: a share of the loss added to it, and the tokens from which on.
        """
        spec = self.spec(rung, seed)
        folder = self.lab / "runs" / spec.run_id
        folder.mkdir(parents=True)
        codec.write_json(folder / "spec.json", spec)
        shared = float(0.004 * self.rng.normal())
        n = count_params(spec.science.shape, VOCAB).n_params
        stop = {"diverged": self.horizons[0] // 3, "running": int(0.31 * self.horizons[-1])}.get(status)
        lines = self._metrics(spec, n, shared, stop)
        if status == "running":
            lines = [line for line in lines if line.get("loss", 0.0) is not None and line["tokens"] <= stop]
        for line in lines:
            if line["kind"] == "val" and line["tokens"] >= off[1]:
                line["loss"] *= 1 + off[0]
        codec.append_jsonl(folder / "metrics.jsonl", lines)
        rows = () if status in ("diverged", "failed") else self._rows(spec, n, shared)
        rows = rows[:1] if status == "running" else rows
        record = RunRecord(
            run_id=spec.run_id,
            ladder=spec.ladder,
            rung=rung,
            status=status,  # type: ignore[arg-type]
            reason=reason,
            science_hash=spec.science.hash,
            rows=rows,
            machine=MACHINE,
            seconds_train=100.0,
            seconds_validate=6.0,
            seconds_checkpoint=1.0,
            unknown={"mfu_frac": "no peak is known for this processor", "kwh": "no power reading on this machine"},
        )
        codec.write_json(folder / "record.json", record)
        return spec

    def _rows(self, spec: RunSpec, n: int, shared: float) -> tuple[Row, ...]:
        rows = []
        params = count_params(spec.science.shape, VOCAB)
        per_token = flops_per_token(spec.science.shape, VOCAB)
        before = 0
        for d in self.horizons:
            loss = planted(n, d) * math.exp(shared + 0.001 * self.rng.normal())
            own = (d - before) + 0.2 * before
            rate = 4e10 / per_token
            rows.append(
                Row(
                    row_id=f"{spec.run_id}@{d}",
                    run_id=spec.run_id,
                    rung=spec.rung,
                    seed=spec.science.seed,
                    n_params=n,
                    n_tokens=d,
                    loss_nats=loss,
                    loss_se_nats=0.012,
                    bpb=loss * 0.46,
                    flops=per_token * d,
                    flops_marginal=per_token * own,
                    n_body=params.n_body,
                    n_pos=params.n_pos,
                    n_embed=params.n_embed,
                    n_head=params.n_head,
                    n_steps=d // self.batch,
                    batch_tokens=self.batch,
                    lr_peak=spec.science.schedule.lr_peak,
                    schedule="wsd",
                    decayed=True,
                    optimizer="adamw",
                    precision="fp32",
                    data_id="0123456789ab",
                    n_tokens_unique=d,
                    seconds=8 + d / rate,
                    seconds_marginal=4 + own / rate,
                    tokens_per_s=rate,
                    mfu_frac=None,
                    usd=0.05 * (8 + d / rate) / 3600,
                    usd_marginal=0.05 * (4 + own / rate) / 3600,
                )
            )
            before = d
        return tuple(rows)

    def _metrics(self, spec: RunSpec, n: int, shared: float, stop: int | None) -> list[dict[str, object]]:
        lines: list[dict[str, object]] = []
        update, last = 0, 0
        peak = spec.science.schedule.lr_peak

        def loss_at(d: float, gain: float) -> float:
            early = 7.6**-14 + ((planted(n, d) + 0.09 * (1 - gain)) * math.exp(shared)) ** -14  # starts at log V
            return float(early ** (-1 / 14))

        def step(phase: str, k: int, gain: float, lr: float) -> None:
            nonlocal update
            d = (k + 1) * self.batch
            value = loss_at(d, gain) + 0.06 * float(self.rng.normal())
            head = {"update": update, "phase": phase, "step": k, "tokens": d}
            lines.append({"kind": "step", **head, "lr": lr, "loss": value, "grad_norm": 0.4 + 20 / (k + 10)})
            update += 1
            if (k + 1) % 16 == 0:
                val = loss_at(d, gain) * 1.004 + 0.006 * float(self.rng.normal())
                lines.append({"kind": "val", **head, "loss": val, "loss_se": 0.03, "bpb": val * 0.46, "set": "curve"})
            if (k + 1) % 40 == 0:
                lines.append({"kind": "rate", **head, "tokens_per_s": 4e10 / (6 * n) * 1.02, "mfu": None})

        for d in self.horizons:
            fork = int(d * 0.8) // self.batch
            for k in range(last, fork):
                if stop is not None and (k + 1) * self.batch > stop:
                    lines.append(
                        {
                            "kind": "step",
                            "update": update,
                            "phase": "trunk",
                            "step": k,
                            "tokens": (k + 1) * self.batch,
                            "lr": peak,
                            "loss": None,
                            "grad_norm": None,
                        }
                    )
                    return lines
                step("trunk", k, 0.0, peak * min(1.0, (k + 1) / 10))
            for k in range(fork, d // self.batch):
                share = (k - fork + 1) / (d // self.batch - fork)
                step(f"decay@{d}", k, share, peak * (1 - math.sqrt(share)))
            last = fork
        return lines

    def all_rungs(self) -> "Synthetic":
        for rung in SHAPES:
            self.run(rung)
        return self


@pytest.fixture(scope="session")
def make_lab() -> type[Synthetic]:
    """Makes a lab in a folder of one's own."""
    return Synthetic


@pytest.fixture
def synthetic(tmp_path: Path) -> Synthetic:
    """An empty lab named quickstart."""
    return Synthetic(tmp_path / "quickstart")
