"""`homelab bench data` on a small text: every number measured, the JSON whole."""

import json

import pytest

from homelab_scaling import cli
from homelab_scaling.bench import data


def test_a_small_race_reports_every_contestant(monkeypatch, capsys) -> None:
    monkeypatch.setattr(data, "TEXT_BYTES", 300_000)
    monkeypatch.setattr(data, "_N_BATCHES", 5)
    assert cli.main(["bench", "data", "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 300_000 <= result["n_bytes"] < 2_000_000
    assert result["n_tokens"] < result["n_bytes"] / 2
    for name in ("ours", "peer", "peer_fast"):
        assert len(result[name]["mb_per_s"]) == 2 and min(result[name]["mb_per_s"]) > 0
    wanted = [a / b for a, b in zip(result["ours"]["mb_per_s"], result["peer"]["mb_per_s"], strict=True)]
    assert result["ratios"] == pytest.approx(wanted)
    assert set(result["read_tokens_per_s"]) == {"128", "1024"}


def test_the_summary_says_whether_the_target_was_reached() -> None:
    def bench(ratio: float) -> str:
        rate = data.Rate(name="x", mb_per_s=(1.0, 2.0, 9.0))
        return data.DataBench(
            n_bytes=10**7,
            n_tokens=10**6,
            n_cores=2,
            tokenizers_version="0",
            ours=rate,
            peer=rate,
            peer_fast=rate,
            ratios=(0.1, ratio, 5.0),
            target_ratio=0.8,
            read_tokens_per_s={"128": 5e6},
        ).summary()

    assert "0.81  (0.10 to 5.00), wanted 0.80: reached" in bench(0.81)
    assert "MISSED" in bench(0.79)
    assert "2.00 MB/s  (1.00 to 9.00)" in bench(1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["dat"], "no bench 'dat'; did you mean data?"), (["data", "--rounds", "0"], "wants 1 or more")],
)
def test_bad_requests(argv: list[str], said: str, capsys) -> None:
    assert cli.main(["bench", *argv]) == 2
    assert said in capsys.readouterr().err
