"""A ladder that was stopped early still gets its table and its report."""

from types import SimpleNamespace

from toy_run import train_here

from homelab_scaling.tools.run import _wrap_up


def test_one_row_is_too_few_for_a_law_but_not_for_a_report(make_run, capsys) -> None:
    spec, folder = make_run(horizons=(20,))
    train_here(spec, folder)
    lab = folder.path.parent.parent
    (lab / "fit").mkdir()
    (lab / "fit" / "fit.json").write_text("{}")  # left over from another version of the ladder
    report = _wrap_up(SimpleNamespace(lab=lab, ladder=SimpleNamespace(name="toy")))
    assert report.exists() and (lab / "runs.csv").read_text().count("\n") == 2
    assert not (lab / "fit" / "fit.json").exists()
    assert "no fit: toy" in capsys.readouterr().err


def test_no_row_at_all(make_run, capsys) -> None:
    _, folder = make_run()
    report = _wrap_up(SimpleNamespace(lab=folder.path.parent.parent, ladder=SimpleNamespace(name="toy")))
    assert report.exists() and "no fit" in capsys.readouterr().err
