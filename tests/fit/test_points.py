"""Points tables: good ones read as they are, bad ones refused in one sentence naming row and column."""

import json
from pathlib import Path

import pytest

from homelab_scaling import cli
from homelab_scaling.errors import DataError
from homelab_scaling.fit import points as points_module
from homelab_scaling.fit.points import Selection, parse_pairs, read_points

GOOD = (
    "n_params,n_tokens,loss_nats\n1000000,2000000,4.1\n2000000,2000000,3.9\n4000000,2000000,3.7\n8000000,2000000,3.6\n"
)

BAD = {
    "empty file": ("", "the file is empty"),
    "header only": ("n_params,n_tokens,loss_nats\n", "a header but no row"),
    "missing column": ("n_params,n_tokens\n1,2\n", "no column loss_nats"),
    "no tokens, no flops": ("n_params,loss_nats\n1,2\n", "no column n_tokens and no flops"),
    "negative loss": (GOOD.replace("3.9", "-3.9"), "row 3, column loss_nats is -3.9, wants a number above 0"),
    "zero loss": (GOOD.replace("3.7", "0"), "row 4, column loss_nats is 0"),
    "N of 0": (GOOD.replace("4000000", "0"), "row 4, column n_params is 0"),
    "D of 0": (GOOD.replace("1000000,2000000", "1000000,0"), "row 2, column n_tokens is 0"),
    "text in a number": (GOOD.replace("3.6", "n/a"), "row 5, column loss_nats is 'n/a', wants a number"),
    "NaN": (GOOD.replace("4.1", "nan"), "row 2, column loss_nats is nan, wants a finite number"),
    "infinite": (GOOD.replace("4.1", "inf"), "row 2, column loss_nats is inf, wants a finite number"),
    "empty cell": (GOOD.replace("4.1", ""), "row 2, column loss_nats is empty"),
    "duplicate row": (GOOD + "8000000,2000000,3.6\n", "row 6 has the same N, D, loss and seed as row 5"),
    "duplicate row_id": (
        "row_id,n_params,n_tokens,loss_nats\na,1,2,3\nb,2,2,2.9\na,4,2,2.8\n",
        "a has the same row_id as a",
    ),
    "one row": ("n_params,n_tokens,loss_nats\n1000000,2000000,4.1\n", "1 finished point; a law needs at least three"),
    "all rows equal": (
        "n_params,n_tokens,loss_nats,seed\n5,7,3.0,0\n5,7,3.0,1\n5,7,3.0,2\n",
        "all 3 rows have the same N and D",
    ),
    "short row": (GOOD + "1,2\n", "row 6 has 2 cells, the header 3"),
    "column twice": ("n_params,n_tokens,loss_nats,loss_nats\n1,2,3,4\n", "column loss_nats is there twice"),
    "mixed texts": (
        "n_params,n_tokens,loss_nats,data_id\n1,2,3,a\n2,2,2.9,b\n4,2,2.8,a\n",
        "rows of 2 different texts (data_id a, b)",
    ),
    "negative standard error": (
        "n_params,n_tokens,loss_nats,loss_se_nats\n1,2,3,0.1\n2,2,2.9,-0.1\n",
        "row 3, column loss_se_nats is -0.1, wants 0 or more",
    ),
    "bad truth value": (
        "n_params,n_tokens,loss_nats,decayed\n1,2,3,maybe\n",
        "row 2, column decayed is 'maybe', wants true or false",
    ),
    "nothing decayed": (
        "n_params,n_tokens,loss_nats,decayed\n1,2,3,false\n2,2,2.9,false\n",
        "0 finished points (2 excluded: its learning rate had not decayed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_sentence_and_exit_2(case, tmp_path: Path, capsys):
    text, wanted = BAD[case]
    path = tmp_path / "points.csv"
    path.write_text(text)
    assert cli.run_verb("fit", [str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


FLAGS = {
    "unknown own column": (["--columns", "loss=loss_nats"], "we know no column loss"),
    "unknown file column": (["--columns", "loss_nats=val"], "no column val"),
    "not a pair": (["--columns", "loss_nats"], "wants name=value"),
    "pair twice": (["--columns", "loss_nats=a", "loss_nats=b"], "given twice"),
    "where unknown": (["--where", "subset=hot"], "no column subset"),
    "where empty": (["--where", "n_params=3"], "no row has n_params=3"),
    "drop all": (["--drop-highest-loss", "4"], "drop 0 or more, not all"),
    "drop negative": (["--drop-highest-loss", "-1"], "drop 0 or more, not all"),
    "law": (["--law", "kaplan-2"], "no law 'kaplan-2'"),
    "objective": (["--objective", "mse"], "no objective 'mse'"),
    "count": (["--count", "body"], "column n_body is empty"),
    "bootstrap": (["--bootstrap", "-5"], "bootstrap"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_are_one_sentence_and_exit_2(case, tmp_path: Path, capsys):
    flags, wanted = FLAGS[case]
    path = tmp_path / "points.csv"
    path.write_text(GOOD)
    assert cli.run_verb("fit", [str(path), *flags]) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert err.count("\n") == 1


def test_other_bad_files(tmp_path: Path):
    with pytest.raises(DataError, match="no such file or lab"):
        read_points(tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes("n_params,größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_points(tmp_path / "latin.csv")
    (tmp_path / "nul.csv").write_bytes(b'n_params,n_tokens,loss_nats\n"1,2,3' + b"x" * 200_000)
    with pytest.raises(DataError, match="not a CSV file"):
        read_points(tmp_path / "nul.csv")
    with pytest.raises(DataError, match="for CSV files"):
        read_points(tmp_path, Selection(where={"a": "b"}))


def test_too_many_rows_stop_at_the_limit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(points_module, "MAX_ROWS", 3)
    (tmp_path / "points.csv").write_text(GOOD)
    with pytest.raises(DataError, match="row 5 is one more than 3 rows"):
        read_points(tmp_path / "points.csv")


def test_published_headers_are_read_as_they_are(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text(
        "\ufeffset,N,C,val\nhot,1e6,1.2e13,4.0\ncool,2e6,1.2e13,3.9\nhot, 4e6 ,2.4e13,3.7\n\nhot,8e6,2.4e13,3.6\n"
    )
    selection = Selection(
        columns=parse_pairs(("n_params=N", "flops=C", "loss_nats=val"), "--columns"),
        where={"set": "hot"},
        drop_highest_loss=1,
    )
    table = read_points(path, selection)
    assert [p.n_params for p in table.points] == [4e6, 8e6]
    assert [p.n_tokens for p in table.points] == [1e6, 5e5]
    assert table.excluded[0].row_id == "row 2"
    assert "highest losses" in table.excluded[0].reason
    assert table.notes == ("n_tokens was missing and derived as flops / (6 n_params)",)


def test_unfinished_schedules_are_excluded_with_a_reason(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text(
        "n_params,n_tokens,loss_nats,decayed\n1e6,1e6,4,true\n2e6,1e6,3.9,false\n4e6,1e6,3.7,1\n8e6,1e6,3.6,\n"
    )
    table = read_points(path)
    assert [p.n_params for p in table.points] == [1e6, 4e6, 8e6]
    assert [e.row_id for e in table.excluded] == ["row 3"]


def test_json_is_one_document_and_files_only_where_asked(tmp_path: Path, capsys):
    path = tmp_path / "points.csv"
    path.write_text(GOOD)
    assert cli.run_verb("fit", [str(path), "--json", "--bootstrap", "50"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["fits"][0]["law"] == "power-n"
    assert list(tmp_path.iterdir()) == [path]
    assert cli.run_verb("fit", [str(path), "--bootstrap", "50", "--out", str(tmp_path / "fit")]) == 0
    shown = capsys.readouterr()
    assert "power-n" in shown.out and "95 % profile" in shown.out
    assert (tmp_path / "fit" / "fit.json").exists()


# --------------------------------------------------------------------------------------------- files of other tools

WANDB_TABLE = (
    '\ufeff"Name","State","Created","num_params","tokens - total","gpt - val/loss"\n'
    '"a, first","finished","2026-01-01T00:00:00Z","1000000","20000000","4.1"\n'
    '"b","crashed","2026-01-01T00:00:00Z","2000000","20000000",""\n'
    '"c","finished","2026-01-01T00:00:00Z","4000000","40000000","3.6"\n'
)
NAMES = {"row_id": "Name", "n_params": "num_params", "n_tokens": "tokens - total", "loss_nats": "gpt - val/loss"}


def test_a_table_of_runs_as_wandb_exports_it(tmp_path: Path):
    (tmp_path / "export.csv").write_text(WANDB_TABLE, encoding="utf-8")
    table = read_points(tmp_path / "export.csv", Selection(columns=NAMES, where={"State": "finished"}))
    assert [(p.row_id, p.n_params, p.n_tokens, p.loss_nats) for p in table.points] == [
        ("a, first", 1e6, 2e7, 4.1),
        ("c", 4e6, 4e7, 3.6),
    ]
    with pytest.raises(DataError, match="row 3, column loss_nats is empty"):
        read_points(tmp_path / "export.csv", Selection(columns=NAMES))


def test_a_chart_as_wandb_exports_it_is_told_from_a_table(tmp_path: Path):
    header = '"Step","run-1 - val/loss","run-1 - val/loss__MIN","run-1 - val/loss__MAX"\n'
    (tmp_path / "chart.csv").write_text(header + '"10","4.1","4.1","4.1"\n')
    with pytest.raises(
        DataError, match="this is a chart as W&B exports it, a column per run; export the table of runs"
    ):
        read_points(tmp_path / "chart.csv")


@pytest.mark.parametrize(("separator", "decimal"), [(";", ","), (";", "."), ("\t", ".")])
def test_what_spreadsheets_separate_by(tmp_path: Path, separator: str, decimal: str):
    rows = [["n_params", "n_tokens", "loss_nats"], ["1e6", "2e7", "4.125"], ["2000000", "20000000", "3.5"]]
    text = "\n".join(separator.join(cell.replace(".", decimal) for cell in row) for row in rows)
    (tmp_path / "points.csv").write_text(text)
    points = read_points(tmp_path / "points.csv").points
    assert [(p.n_params, p.n_tokens, p.loss_nats) for p in points] == [(1e6, 2e7, 4.125), (2e6, 2e7, 3.5)]


@pytest.mark.parametrize("size", ["1,000,000", "124,000", "1,5e6"])
def test_commas_of_thousands_are_no_decimals(tmp_path: Path, size: str):
    (tmp_path / "points.csv").write_text(f"n_params;n_tokens;loss_nats\n{size};2e7;4,1\n2e6;2e7;3,9\n")
    with pytest.raises(DataError, match=f"row 2, column n_params is '{size}', wants a number"):
        read_points(tmp_path / "points.csv")
