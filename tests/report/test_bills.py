"""The table of energy and money: measured, stated, partly seen, unknown."""

from dataclasses import replace

import pytest

from homelab_scaling import codec
from homelab_scaling.report.bills import energy_and_money
from homelab_scaling.report.collect import collect
from homelab_scaling.report.page import write_report
from homelab_scaling.runs import RunFolder


def with_energy(synthetic, *, source="counter", unseen=0.0, priced=True, paused_s=0.0) -> None:
    """Gives every row of every record an energy: 0.1 kWh at the cards, 0.2 at the plug, half of both of its own."""
    for path in (synthetic.lab / "runs").iterdir():
        folder = RunFolder(path)
        record = folder.read_record()
        rows = [
            replace(
                row,
                kwh=0.1,
                kwh_marginal=0.05,
                kwh_from=source,
                kwh_err_frac=None if source == "stated watts" else 0.05 + unseen,
                kwh_unmetered_frac=unseen,
                kwh_wall=0.2,
                kwh_wall_marginal=0.1,
                kwh_wall_err_frac=None if source == "stated watts" else 0.15,
                usd_energy=0.3 if priced else None,
                usd_energy_marginal=0.15 if priced else None,
                usd_machine=0.5 if priced else None,
                usd_machine_marginal=0.25 if priced else None,
                usd=0.8 if priced else None,
                usd_marginal=0.4 if priced else None,
            )
            for row in record.rows
        ]
        codec.write_json(folder.record, replace(record, rows=tuple(rows), seconds_paused=paused_s))


def test_a_line_per_row_and_the_bill(synthetic) -> None:
    synthetic.all_rungs()
    with_energy(synthetic, unseen=0.1, paused_s=60.0)
    (grid,) = energy_and_money(collect(synthetic.lab))
    assert grid.head[-3:] == ("energy", "machine", "together") and len(grid.rows) == 15 + 1
    first, total = grid.rows[0], grid.rows[-1]
    n_tokens = synthetic.horizons[0]
    assert first[2:4] == ("0.1 ± 15 %", "0.2 ± 15 %") and first[6:] == ("$0.30", "$0.50", "$0.80")
    assert float(first[4]) == pytest.approx(0.1 * 3.6e6 / n_tokens, rel=0.01)
    assert float(first[5]) == pytest.approx(0.1 * 1e6 / n_tokens, rel=0.01)
    assert total == ("the bill", "", "0.75", "1.5", "", "", "$2.25", "$3.75", "$6.00")
    assert "energy counters" in grid.caption and "no sensor saw up to 10 % of the time" in grid.caption
    assert "wait for 5.0 min" in grid.caption


def test_stated_watts_are_not_taken_for_the_cards(synthetic) -> None:
    synthetic.run("67k")
    with_energy(synthetic, source="stated watts", priced=False)
    (grid,) = energy_and_money(collect(synthetic.lab))
    assert len(grid.head) == 6 and grid.rows[0][2:4] == ("–", "0.2") and grid.rows[-1][2:4] == ("–", "0.3")
    assert "an estimate, nothing was measured" in grid.caption and "no sensor saw" not in grid.caption


def test_no_energy_no_table_and_the_reason_beside_the_rows(synthetic) -> None:
    synthetic.run("67k")
    assert energy_and_money(collect(synthetic.lab)) == []
    text = write_report(synthetic.lab).with_name("report.md").read_text(encoding="utf-8")
    assert "Not known here: MFU and kWh (no peak is known for this processor; no power reading on this machine)" in text
    with_energy(synthetic)
    text = write_report(synthetic.lab).with_name("report.md").read_text(encoding="utf-8")
    assert "kWh/Mtoken" in text and "Not known here: MFU (no peak is known for this processor)." in text
