"""`homelab ddp`: what it prints, saves and refuses; ranks are launched for real once, slowly."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import cli, codec
from homelab_scaling.bench import ddp
from homelab_scaling.bench.ddp_job import ProbeAnswer, ProbeJob
from homelab_scaling.bench.ddp_page import as_text
from homelab_scaling.errors import MachineError, RunFailed, SpecError
from homelab_scaling.plan.ddp import MIB, choose_bucket_mib
from homelab_scaling.plan.ddp_times import (
    CardLink,
    CardPair,
    DdpMeasurement,
    RungTimes,
    Sweep,
    Timed,
    Transfer,
    read_ddp,
)
from homelab_scaling.plan.peaks import box_with

PUBLISHED = ("single=22.03", "ddp=26.36", "compute=15.12", "communication=11.24")


def homelab(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run_verb("ddp", list(argv))
    out, err = capsys.readouterr()
    return code, out, err


# ------------------------------------------------------------------------------------------------ somebody else's times


def test_published_times_are_judged_under_both_scalings(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = homelab(capsys, "--times", *PUBLISHED)
    assert code == 0
    for said in ("42.6%", "efficiency 41.8%, speed-up 0.84x", "efficiency 83.6%, throughput 1.67x", "strong", "weak"):
        assert said in out
    assert "advice: two independent runs" in out
    code, out, _ = homelab(capsys, "--times", *PUBLISHED, "--json")
    assert code == 0 and json.loads(out)["advice"] == "two independent runs"


@pytest.mark.parametrize(
    "times, said",
    [
        (("single=22",), "wants ddp too"),
        (("ddp=3",), "wants single too"),
        (("single=x", "ddp=3"), "'x' is not a number"),
        (("twice=3",), "a name among single, ddp"),
        (("single=22", "ddp"), "NAME=MILLISECONDS"),
        (("single=22", "ddp=-3"), "ddp = -3 ms"),
        (("single=nan", "ddp=3"), "single = nan ms"),
        (("single=22", "ddp=26", "compute=90"), "must be of one and the same step"),
    ],
)
def test_nonsense_times_are_one_sentence(times: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = homelab(capsys, "--times", *times)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------- cards not here


def test_the_model_speaks_of_cards_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = homelab(capsys, "gpt2_5m_120m", "--card", "RTX 4080", "--gpus", "2", "--lab", str(tmp_path))
    assert code == 0 and "assumed 8 GB/s" in out and "Ladder gpt2_5m_120m on two cards" in out
    assert not (tmp_path / "machine").exists()
    code, out, _ = homelab(capsys, "gpt2_5m_120m", "--card", "RTX 4080", "--json", "--lab", str(tmp_path))
    found = json.loads(out)
    assert found["measurement"] is None and len(found["advice"]["rungs"]) == 5


def test_what_cannot_be_measured_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = ("--lab", str(tmp_path))
    for argv, said in [
        (("nope", "--cpu"), "no such ladder"),
        (("quickstart", "--cpu", "--rung", "7b"), "no rung '7b'; its rungs are 54k"),
        (("--cpu", "--ranks", "1"), "wants 2 or more"),
        (("--cpu", "--steps", "0"), "wants 1 or more"),
        (("--card", "RTX 4080", "--gpus", "1"), "one card exchanges nothing"),
        (("--card", "RTX 9"), "not in the table"),
    ]:
        code, out, err = homelab(capsys, *argv, *lab)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1
    one = box_with("RTX 4080", 1)
    monkeypatch.setattr("homelab_scaling.box.detect_box", lambda: one)
    code, _, err = homelab(capsys, *lab)
    assert code == 2 and "found one RTX 4080, wants two" in err and "--gpus 2" in err and "--cpu" in err
    with pytest.raises(MachineError, match="2 to 2"):
        ddp.choose_ranks(box_with("RTX 4080", 2), 3)


# --------------------------------------------------------------------------------------------------- two cards, played


def timed(seconds: float) -> Timed:
    return Timed(seconds=seconds, low_s=0.98 * seconds, high_s=1.02 * seconds, n=20)


class PlayedCards:
    """Answers a job as two cards with 8 GB/s between them would, and remembers the environment it was asked under."""

    def __init__(self) -> None:
        self.jobs: list[tuple[ProbeJob, str | None]] = []

    def __call__(self, job: ProbeJob) -> ProbeAnswer:
        import os

        switch = os.environ.get("NCCL_P2P_DISABLE")
        self.jobs.append((job, switch))
        per_s = 8e9 if switch is None else 4e9
        transfers = tuple(Transfer(n_bytes=n * MIB, timed=timed(1e-4 + n * MIB / per_s)) for n in job.sweep_mib)
        rungs = []
        for rung in job.rungs:
            compute, sync = 2e-7 * rung.batch_tokens, 0.006
            rungs.append(
                RungTimes(
                    rung=rung.name,
                    shape=rung.shape,
                    n_vocab=rung.n_vocab,
                    precision=rung.precision,
                    batch_tokens=rung.batch_tokens,
                    microbatch_seqs_per_rank=rung.microbatch_seqs_per_rank,
                    accumulation_steps=1,
                    compiled=rung.compile,
                    bucket_mib=choose_bucket_mib(rung.shape, rung.n_vocab),
                    alone_full=timed(2 * compute),
                    alone_rank=timed(compute),
                    together_full=timed(2.05 * compute),
                    together_rank=timed(1.02 * compute),
                    no_sync=timed(1.04 * compute),
                    sync=timed(1.04 * compute + sync),
                    sync_bucket_25=timed(1.04 * compute + 1.3 * sync),
                    sync_bf16=timed(1.04 * compute + 0.6 * sync),
                )
            )
        link = {"name": "RTX 4080", "generation": 4, "generation_max": 4, "width": 8, "width_max": 16}
        return ProbeAnswer(
            backend="nccl",
            threads_per_rank=None,
            torch="2.13.0",
            sweep=Sweep(setting=f"NCCL_P2P_DISABLE {switch or 'unset'}", transfers=transfers),
            links=tuple(CardLink(index=i, **link) for i in range(2)),
            pairs=(CardPair(first=0, second=1, p2p="not by this chipset"),),
            why_no_links=None,
            rungs=tuple(rungs),
        )


def test_two_cards_are_measured_with_and_without_peer_to_peer_and_the_page_fits_100_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    setting = ddp.open_setting("gpt2_5m_120m", tmp_path, box_with("RTX 4080", 2), 2)
    cards = PlayedCards()
    found = ddp.measure(setting, labs=tmp_path, say=lambda _: None, launch=cards)
    assert [(bool(job.rungs), switch) for job, switch in cards.jobs] == [(True, None), (False, "1")]
    job = cards.jobs[0][0]
    assert job.device == "cuda" and all(r.compile for r in job.rungs) and len(job.rungs) == 5
    assert all(r.single_microbatch_seqs >= r.microbatch_seqs_per_rank for r in job.rungs)
    assert read_ddp(tmp_path) == found and found.other_sweep is not None
    report = ddp.report(setting, found, labs=tmp_path)
    text = as_text(report)
    assert max(len(line) for line in text.splitlines()) <= 100
    for said in ("PCIe gen 4 x8 of gen 4 x16", "not by this chipset", "NCCL_P2P_DISABLE 1", "bf16", "500 MiB"):
        assert said in text
    for verdict, times in zip(report.verdicts, found.rungs, strict=True):
        assert verdict.judgement.communication_s == pytest.approx(0.006)
        assert verdict.judgement.runs_speedup == pytest.approx(2 / 1.025)
        assert verdict.judgement.wrapper_s == pytest.approx(0.02 * times.alone_rank.seconds)
    small, large = report.advice.rungs[0], report.advice.rungs[-1]
    assert small.efficiency < large.efficiency and large.basis.startswith("measured")
    codec.from_plain(json.loads(codec.dumps(found)), DdpMeasurement, "json")


def test_a_switch_that_breaks_the_ranks_does_not_cost_what_was_measured(tmp_path: Path) -> None:
    class Broken(PlayedCards):
        def __call__(self, job: ProbeJob) -> ProbeAnswer:
            if not job.rungs:
                raise RunFailed("the timing ranks left no answer")
            return super().__call__(job)

    setting, said = ddp.open_setting("gpt2_5m_120m", tmp_path, box_with("RTX 4080", 2), 2), list[str]()
    found = ddp.measure(setting, labs=tmp_path, rungs=("5m",), say=said.append, launch=Broken())
    assert read_ddp(tmp_path) == found and found.rungs and found.other_sweep is None
    assert "left no answer" in said[-1]


def test_rungs_measured_earlier_by_the_same_means_are_kept(tmp_path: Path) -> None:
    setting, cards = ddp.open_setting("gpt2_5m_120m", tmp_path, box_with("RTX 4080", 2), 2), PlayedCards()
    for rung in ("5m", "124m", "5m"):
        ddp.measure(setting, labs=tmp_path, rungs=(rung,), say=lambda _: None, launch=cards)
    kept = read_ddp(tmp_path)
    assert kept is not None and sorted(r.rung for r in kept.rungs) == ["124m", "5m"]
    ddp.measure(setting, labs=tmp_path, rungs=("24m",), say=lambda _: None, launch=cards, save=False)
    assert read_ddp(tmp_path) == kept
    other = replace(kept, torch="2.6.0")
    assert ddp.with_earlier(kept, other) == kept == ddp.with_earlier(kept, None)


def test_ranks_that_leave_no_answer_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("homelab_scaling.sweep.recipe.run_recipe", lambda *_a, **_k: 1)
    setting = ddp.open_setting("quickstart", tmp_path, ddp.cpu_only(), 2)
    with pytest.raises(RunFailed, match="exit code 1"):
        ddp.measure(setting, labs=tmp_path, say=lambda _: None)
    with pytest.raises(SpecError, match="no rung"):
        ddp.measure(setting, labs=tmp_path, rungs=("x",), say=lambda _: None)
    assert read_ddp(tmp_path) is None


LADDER = """
name = "tiny"
context_tokens = 32
rungs = [{ name = "a", n_layer = 1, d_model = 16, n_head = 1 }]
data = { sources = ["text"], tokenizer = "bytes" }
horizons = { tokens = [10_240] }
batch = { tokens = 512 }
"""


@pytest.mark.slow
def test_two_cpu_ranks_over_gloo_from_end_to_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = tmp_path / "tiny.toml"
    ladder.write_text(LADDER)
    monkeypatch.setattr("homelab_scaling.bench.ddp.SWEEP_MIB", (1, 4))
    began = time.time()
    code, out, err = homelab(capfd, str(ladder), "--cpu", "--steps", "4", "--json", "--lab", str(tmp_path / "lab"))
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    kept = read_ddp(tmp_path / "lab")
    assert kept is not None and kept.measured_s >= began and codec.to_plain(kept) == found["measurement"]
    assert (kept.backend, kept.n_ranks, kept.device) == ("gloo", 2, "cpu")
    assert [t.n_bytes for t in kept.sweep.transfers] == [MIB, 4 * MIB] and kept.why_no_links == "no GPU"
    (times,) = kept.rungs
    assert times.batch_tokens == 512 and times.sync.n == 4 and times.no_sync.n == 8 and times.alone_full.n == 4
    assert all(t.seconds > 0 for t in (times.alone_full, times.alone_rank, times.together_full, times.sync))
    (verdict,) = found["verdicts"]
    assert verdict["judgement"]["strong_speedup"] == pytest.approx(times.alone_full.seconds / times.sync.seconds)
