"""`homelab bench coverage` with a few worlds: every setting told, the verdict said."""

import dataclasses
import json

from homelab_scaling import codec
from homelab_scaling.bench import coverage


def test_every_setting_is_told_and_judged(monkeypatch) -> None:
    monkeypatch.setattr(coverage, "WORLDS_A_ROUND", 3)
    said: list[str] = []
    result = coverage.run(n_rounds=1, say=said.append, n_draws=30)
    assert len(said) == len(result.settings) == 5
    assert {one.n_worlds for one in result.settings} == {3}
    assert [one["setting"] for one in json.loads(codec.dumps(result))["settings"]] == [s.split(":")[0] for s in said]


def test_the_verdict_names_what_missed(monkeypatch) -> None:
    monkeypatch.setattr(coverage, "WORLDS_A_ROUND", 2)
    one = coverage.run(n_rounds=1, say=print, n_draws=20).settings[0]

    def bench(held_frac: float) -> str:
        found = tuple(dataclasses.replace(c, held_frac=held_frac) for c in one.found)
        return coverage.CoverageBench(settings=(dataclasses.replace(one, found=found),)).summary()

    assert bench(0.95).endswith("a and ln N_opt wanted in 92% to 99%: reached")
    assert bench(0.91).endswith("MISSED by a at .3 %, ln N_opt at .3 %")
