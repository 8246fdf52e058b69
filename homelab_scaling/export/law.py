"""What the law of a lab says of one of its models; for the model card."""

from dataclasses import dataclass

from homelab_scaling.errors import HomelabError
from homelab_scaling.export.trained import Trained
from homelab_scaling.fit.catalogue import joint_fit
from homelab_scaling.fit.predict import Forecast, count_of, predict_loss
from homelab_scaling.fit.result import ScalingFit, load_fit
from homelab_scaling.fit.words import brief, listed
from homelab_scaling.plan.counting import count_params
from homelab_scaling.report.words import COUNTS


@dataclass(frozen=True, kw_only=True)
class Law:
    """The law of the lab that the model belongs to, and what it says of this model."""

    name: str
    formula: str
    parameters: str
    """In words, with intervals."""
    rows: str
    count: str
    n_points: int
    forecast: Forecast
    sigma_log: float | None


def read_law(trained: Trained) -> Law | str:
    """The law of N and D in the lab's fit, asked about this model; in words why there is none.

    The lab is the folder above `runs`.
    """
    lab = trained.run.path.parent.parent
    if not (lab / "fit" / "fit.json").is_file():
        return "no law has been fitted in its lab"
    try:
        report = load_fit(lab / "fit")
        fit, law, drawn = joint_fit(report)
        forecast = predict_loss(
            fit, drawn, n_params=counted(trained, count_of(report)), n_tokens=float(trained.checkpoint.tokens)
        )
    except HomelabError as error:
        return f"the fit of its lab has no answer for it ({error})"
    return Law(
        name=fit.law,
        formula=law.formula,
        parameters=_parameters(fit),
        rows=fit.rows.split(":")[0],
        count=COUNTS.get(report.count, report.count),
        n_points=fit.n_points,
        forecast=forecast,
        sigma_log=fit.sigma_log,
    )


def _parameters(fit: ScalingFit) -> str:
    """Each with its 95 % interval, and those that the points do not pin down."""
    known, open_ = [], []
    for name, found in fit.parameters.items():
        if found.value is None:
            open_.append(name)
        else:
            interval = f" [{brief(found.ci95[0])}, {brief(found.ci95[1])}]" if found.ci95 else ""
            known.append(f"{name} = {brief(found.value)}{interval}")
    said = [f"{', '.join(known)} (95 % intervals)"] if known else []
    return "; ".join([*said, *([f"{listed(open_)} not pinned down by these points"] if open_ else [])])


def counted(trained: Trained, count: str) -> float:
    """N as a fit counts it."""
    science = trained.spec.science
    groups = count_params(science.shape, science.n_vocab)
    return float({"body": groups.n_body, "body+head": groups.n_body + groups.n_head}.get(count, groups.n_params))
