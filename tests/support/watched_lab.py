"""A lab in mid-flight that was never trained: the reference ladder's plan, runs along a planted law at planned speeds,
and two simulated cards (the thermal plant of the hardware reference) under the real policy."""

import datetime
import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.runs import Machine, Row, RunFolder, RunRecord
from homelab_scaling.specs import CorpusManifest, RunSpec, ShardFile, Split
from homelab_scaling.train.schedule import Phase, phases
from homelab_scaling.watch.link import Control, Registration, Status, worst
from homelab_scaling.watch.policy import initial_state, judge
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.recording import Recording

NOW = 1_750_000_000.0  # in the past: whatever a test forgets to date is newer, today and in ten years
GIB = 2**30
DEVICE = "NVIDIA GeForce RTX 4080"
POWER_W = 2 * 268.0
UUIDS = ("GPU-6c1d9a52-0000-4000-8000-000000000000", "GPU-b70e44f8-0000-4000-8000-000000000001")
MACHINE = Machine(
    device=DEVICE,
    n_processes=2,
    torch="2.13.0",
    accelerate="1.15.0",
    transformers="5.23.0",
    python="3.11.9",
    homelab_scaling="0.1.0",
)


def planted(n: float, d: float) -> float:
    return 1.9 + 405 * n**-0.34 + 410 * d**-0.285


def iso(t_s: float) -> str:
    return datetime.datetime.fromtimestamp(t_s, datetime.UTC).isoformat(timespec="seconds")


def _split(name: str, n_tokens: int) -> Split:
    file = ShardFile(name=f"{name}.bin", n_tokens=n_tokens, sha256=name)
    return Split(files=(file,), n_tokens=n_tokens, n_bytes=4 * n_tokens, n_documents=n_tokens // 1000)


def reference_plan() -> Plan:
    """gpt2_5m_120m on two RTX 4080s, its corpus at hand."""
    ladder, _ = read_ladder("gpt2_5m_120m")
    corpus = CorpusManifest(
        tokenizer="gpt2",
        tokenizer_file=None,
        tokenizer_hash="g" * 64,
        n_vocab=50257,
        eot_id=50256,
        dtype="uint16",
        train=_split("train", 3 * 10**9),
        val=_split("val", 10**7),
        sources=("hf:Skylion007/openwebtext",),
        held_out_rule="by content hash",
    )
    return plan_ladder(ladder, corpus, box_with("RTX 4080", 2))


@dataclass
class WatchedLab:
    """LAB/gpt2_5m_120m and LAB/machine, written piece by piece; time runs backwards from `now`."""

    lab: Path
    now: float = NOW
    every: int = 10
    """Log interval in updates; the lab holds one step line for each."""

    def __post_init__(self) -> None:
        self.plan = reference_plan()
        self.ladder = self.lab / self.plan.ladder
        self.rng = random.Random(0)
        plan = self.ladder / "plan.json"
        codec.write_json(plan, self.plan)
        os.utime(plan, (self.now - 86_400, self.now - 86_400))

    def spec(self, rung: str) -> RunSpec:
        return next(run for run in self.plan.runs if run.rung == rung)

    def folder(self, rung: str) -> RunFolder:
        return RunFolder(self.ladder / "runs" / self.spec(rung).run_id)

    def queue(self, *rungs: str) -> None:
        """Spec only."""
        for rung in rungs:
            codec.write_json(self.folder(rung).spec, self.spec(rung))

    def run(
        self, rung: str, *, ends_s: float, done: float = 1.0, status: str = "finished", reason: str | None = None,
        off: float = 0.0, pids: tuple[int, ...] = (), events: tuple[dict[str, Any], ...] = (),
    ) -> float:  # fmt: skip
        """One run up to a share of its updates; returns when it began.

        Args:
            ends_s: when its last line was written.
            off: added share of loss over the second half of what is done.
        """
        spec, folder = self.spec(rung), self.folder(rung)
        self.queue(rung)
        lines, seconds = self._metrics(spec, done, off)
        began = ends_s - seconds
        codec.append_jsonl(folder.metrics, lines)
        segment = {"kind": "segment", "time": iso(began), "update": 0, "step": 0, "pids": list(pids)}
        codec.append_jsonl(folder.events, [segment, *events])
        rows = tuple(self._row(spec, phase) for phase in phases(spec.science) if self._is_done(spec, phase, done))
        self._end(folder, spec, rows, status, reason, ends_s)
        for path in (folder.metrics, folder.events, folder.record):
            os.utime(path, (ends_s, ends_s))
        return began

    def _is_done(self, spec: RunSpec, phase: Phase, done: float) -> bool:
        return phase.earns_row and phase.end_update <= done * phases(spec.science)[-1].end_update

    def _end(self, folder: RunFolder, spec: RunSpec, rows: Any, status: Any, reason: Any, ends_s: float) -> None:
        record = RunRecord(
            run_id=spec.run_id,
            ladder=spec.ladder,
            rung=spec.rung,
            status=status,
            reason=reason or (None if status == "finished" else "in progress"),
            science_hash=spec.science.hash,
            rows=rows,
            machine=MACHINE,
        )
        codec.write_json(folder.record, record)
        earned = [{"kind": "row", "time": iso(ends_s - 60), "row_id": row.row_id} for row in rows]
        ended = [{"kind": "end", "time": iso(ends_s), "status": status}] if status != "running" else []
        codec.append_jsonl(folder.events, [*earned, *ended])

    def rate(self, spec: RunSpec) -> float:
        """Tokens per second: 4 % below the plan."""
        total = phases(spec.science)[-1].end_update * spec.science.batch_tokens_global
        assert spec.execution.predicted_s is not None
        return 0.96 * total / spec.execution.predicted_s

    def _metrics(self, spec: RunSpec, done: float, off: float) -> tuple[list[dict[str, Any]], float]:
        science = spec.science
        n, batch, rate = (
            count_params(science.shape, science.n_vocab).n_params,
            science.batch_tokens_global,
            self.rate(spec),
        )
        last = int(done * phases(science)[-1].end_update)
        own = 1 + 0.004 * self.rng.gauss(0, 1)
        lines: list[dict[str, Any]] = []
        seconds, drift, energy = 0.0, 0.0, 0.0
        curve_every = max(1, (spec.execution.curve_every_tokens or 10**18) // batch)
        for phase in phases(science):
            for update in range(phase.first_update, min(last, phase.end_update)):
                step = phase.start_step + update - phase.first_update
                tokens, at_end = (step + 1) * batch, update + 1 in (last, phase.end_update)
                gain = (update - phase.first_update) / phase.n_updates if phase.kind == "decay" else 0.0
                bad = 1 + (off if update > last / 2 else 0.0)
                loss = (own * planted(n, tokens) * (1.035 - 0.034 * gain) + 5 * (1 + step / 30) ** -1.2) * bad
                head = {"update": update + 1, "phase": phase.name, "step": step + 1, "tokens": tokens}
                if (update + 1) % self.every == 0 or at_end:
                    noisy = loss + 0.025 * self.rng.gauss(0, 1)
                    lr = science.schedule.lr_peak * (1 - gain)
                    lines.append(
                        {
                            "kind": "step",
                            **head,
                            "update": update,
                            "step": step,
                            "lr": lr,
                            "loss": noisy,
                            "grad_norm": 0.4,
                        }
                    )
                    drift = 0.9 * drift + 0.004 * self.rng.gauss(0, 1)
                    interval = self.every * batch / rate * (1 + drift + 0.004 * self.rng.gauss(0, 1))
                    seconds += interval
                    power = POWER_W * (1 + 0.01 * self.rng.gauss(0, 1))
                    energy += power * interval
                    flops = flops_per_token(science.shape, science.n_vocab)
                    lines.append(
                        {"kind": "rate", **head, "interval_tokens": self.every * batch, "interval_s": interval,
                         "tokens_per_s": self.every * batch / interval, "mfu": rate * flops / (2 * 97.5e12),
                         "vram_bytes": int(9.6 * GIB), "power_w": power,
                         "energy_j": energy, "slept_s": 0.0}
                    )  # fmt: skip
                if (step + 1) % curve_every == 0 and not (at_end and phase.earns_row):
                    val = loss * 1.003 + 0.003 * self.rng.gauss(0, 1)
                    lines.append(
                        {"kind": "val", **head, "loss": val, "loss_se": 0.011, "bpb": val * 0.3, "set": "curve"}
                    )
                    seconds += 3.0
        return lines, seconds

    def _row(self, spec: RunSpec, phase: Phase) -> Row:
        science, params = spec.science, count_params(spec.science.shape, spec.science.n_vocab)
        d, flops = phase.horizon_tokens, flops_per_token(spec.science.shape, spec.science.n_vocab)
        seconds = d / self.rate(spec)
        share = d / sum(science.horizons_tokens)
        own_s = share * phases(science)[-1].end_update * science.batch_tokens_global / self.rate(spec)
        kwh = POWER_W * seconds / 3.6e6
        return Row(
            row_id=f"{spec.run_id}@{d}",
            run_id=spec.run_id,
            rung=spec.rung,
            seed=science.seed,
            n_params=params.n_params,
            n_tokens=d,
            loss_nats=planted(params.n_params, d) * (1 + 0.003 * self.rng.gauss(0, 1)),
            loss_se_nats=0.003,
            bpb=None,
            flops=flops * d,
            flops_marginal=flops * d * share,
            n_body=params.n_body,
            n_pos=params.n_pos,
            n_embed=params.n_embed,
            n_head=params.n_head,
            n_steps=phase.end_step,
            batch_tokens=science.batch_tokens_global,
            lr_peak=science.schedule.lr_peak,
            schedule="wsd",
            decayed=True,
            optimizer="adamw8bit",
            precision="bf16",
            data_id="0123456789ab",
            n_tokens_unique=d,
            seconds=seconds,
            seconds_marginal=own_s,
            tokens_per_s=self.rate(spec),
            mfu_frac=0.3,
            kwh=kwh,
            kwh_marginal=POWER_W * own_s / 3.6e6,
            kwh_from="counter",
            kwh_err_frac=0.05,
            kwh_wall=kwh * 1.3,
            kwh_wall_marginal=POWER_W * own_s * 1.3 / 3.6e6,
            usd_energy_marginal=0.2 * POWER_W * own_s * 1.3 / 3.6e6,
            usd_machine_marginal=0.15 * own_s / 3600,
        )

    # ------------------------------------------------------------------------------------------------- the cards

    def machine(self, *, minutes: float = 12.0, ambient: float = 25.0, until_s: float | None = None) -> Status:
        """LAB/machine after so many minutes of two busy cards; the second one breathes the first one's air."""
        until = self.now if until_s is None else until_s
        folder = self.lab / "machine"
        facts = tuple(_facts(i, uuid) for i, uuid in enumerate(UUIDS))
        recording = Recording(folder / "gpu.jsonl")
        by_uuid = {one.uuid: one for one in facts}
        state, verdict, events, readings = initial_state(), None, [], ()
        heat = [ambient + 44.0, ambient + 50.0]
        resist, energy = (0.165, 0.205), [0.0, 0.0]
        noise, started = random.Random(1), until - 60 * minutes
        for second in range(int(60 * minutes) + 1):
            t = started + second
            cards = []
            order = worst(list(verdict.orders.values()) if verdict else [])  # one run on both cards
            duty = 0.0 if order.level in ("pause", "stop") else order.duty
            for i, uuid in enumerate(UUIDS):
                power = 22 + duty * (296 - 22) + noise.gauss(0, 3)
                heat[i] += (ambient + 2 * i + resist[i] * power - heat[i]) / 60
                energy[i] += power
                cards.append(_reading(uuid, heat[i] + noise.gauss(0, 0.4), power, energy[i], duty, i))
            sample = Sample(t_s=t, poll_s=0.0009 + abs(noise.gauss(0, 0.0002)), cards=tuple(cards))
            state, verdict = judge(state, sample, by_uuid, {})
            recording.append(sample, facts)
            events += [{"kind": "transition", **codec.to_plain(one)} for one in verdict.transitions]
            readings = sample.cards
        recording.close()
        assert verdict is not None
        codec.append_jsonl(folder / "events.jsonl", [{"kind": "start", "t_s": started}, *events])
        status = Status(
            pid=1, started_s=started, t_s=until, interval_s=1.0, poll_p50_s=0.0009, poll_p99_s=0.0014, facts=facts,
            readings=readings, cards=verdict.cards,
        )  # fmt: skip
        codec.write_json(folder / "status.json", status)
        codec.write_json(folder / "control.json", Control(id=7, t_s=until, cards=verdict.orders))
        return status

    def register(self, rung: str, pids: tuple[int, ...] = ()) -> None:
        spec = self.spec(rung)
        one = Registration(
            run_id=spec.run_id, folder=str(self.folder(rung).path), pids=pids, cards=UUIDS, started_s=self.now - 9000
        )
        codec.write_json(self.lab / "machine" / "runs" / f"{spec.run_id}.json", one)

    def edit_status(self, **changes: Any) -> None:
        """Rewrites status.json; `card0={...}` and `card1={...}` change a reading."""
        path = self.lab / "machine" / "status.json"
        status = codec.read_json(path, Status)
        readings = [replace(r, **changes.pop(f"card{i}", {})) for i, r in enumerate(status.readings)]
        codec.write_json(path, replace(status, readings=tuple(readings), **changes))

    @classmethod
    def in_flight(cls, lab: Path, *, now: float = NOW, every: int = 10) -> "WatchedLab":
        """Three rungs finished, the fourth at two fifths, one waiting; the second card was just slowed."""
        made = cls(lab, now=now, every=every)
        made.queue("124m")
        status = made.machine(ambient=27.0)
        duty = min(card.duty for card in status.cards.values())
        slowed = [t for t in _lines(lab / "machine" / "events.jsonl") if t.get("after") == "slow"]
        spec, last = made.spec("51m"), int(0.43 * phases(made.spec("51m").science)[-1].end_update)
        step_s = spec.science.batch_tokens_global / made.rate(spec)
        paced = tuple(
            {"kind": "paced", "time": iso(t["t_s"]), "update": last - int((now - t["t_s"]) / step_s), "duty": t["duty"],
             "reason": t["reason"]}
            for t in slowed
        )  # fmt: skip
        assert (duty < 1) == bool(paced)
        ends = made.run("51m", ends_s=now - 2, done=0.43, status="running", pids=(1,), events=paced)
        for rung in ("24m", "12m", "5m"):
            ends = made.run(rung, ends_s=ends - 60)
        made.register("51m", (1,))
        return made


def _facts(index: int, uuid: str) -> CardFacts:
    return CardFacts(
        uuid=uuid, index=index, name=DEVICE, vram_bytes=16 * GIB, capability=(8, 9), slowdown_c=95.0, shutdown_c=98.0,
        limits_from="margins", power_limit_w=320.0, power_limit_default_w=320.0, sm_clock_max_mhz=2820.0,
        has_energy_counter=True, n_fans=2,
    )  # fmt: skip


def _reading(uuid: str, heat: float, power: float, energy: float, duty: float, index: int) -> CardReading:
    hot = heat > 83
    return CardReading(
        uuid=uuid, temperature_c=float(round(heat)), power_w=round(power, 1), power_limit_w=320.0, energy_j=energy,
        energy_from="counter", vram_used_bytes=int((10.4 + 0.2 * index) * GIB), vram_reserved_bytes=int(0.42 * GIB),
        sm_clock_mhz=2535.0 if hot else 2610.0, utilisation_frac=0.98 if duty == 1 else 0.88,
        fan_frac=min(1.0, 0.30 + 0.02 * max(0.0, heat - 60)),
        reasons=("software thermal",) if heat > 86.4 else ("power cap",),
    )  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
