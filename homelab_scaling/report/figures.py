"""The figures of a report, in order: each drawn in both schemes, or the reason why there is none."""

import io
from dataclasses import dataclass
from typing import Any, Literal

from homelab_scaling.report import batch_plots, evals, fit_plots, isoflop_plots, plots, steps_plots
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.parts import Draw, Nothing
from homelab_scaling.report.style import DARK, DPI, LIGHT, themed

N_COLOURS = 128
Section = Literal["answer", "figures", "batch", "steps", "evals"]
"""Where a figure stands: beneath the answer, in a section of figures, or with the text that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A figure that a report can have."""

    draw: Draw
    """Its name is the figure's file name."""
    title: str
    caption: str
    """How to read it."""
    section: Section = "figures"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure in both schemes."""

    name: str
    """File name without .png."""
    title: str
    caption: str
    light_png: bytes
    dark_png: bytes
    section: Section = "figures"


@dataclass(frozen=True, kw_only=True)
class NoPicture:
    """Why a figure is missing, in a sentence."""

    name: str
    title: str
    reason: str
    """Empty where nobody misses it."""


def draw_all(view: LabView) -> list[Picture | NoPicture]:
    """Every figure of the report, drawn in both schemes, or the reason why it is missing."""
    return [_draw(kind, view) for kind in FIGURES]


def _draw(kind: Kind, view: LabView) -> Picture | NoPicture:
    name, pngs = kind.draw.__name__, []
    for theme in (LIGHT, DARK):
        with themed(theme) as plt:
            try:
                figure = kind.draw(plt, view, theme)
            except Nothing as reason:
                return NoPicture(name=name, title=kind.title, reason=str(reason))
            pngs.append(to_png(figure))
    return Picture(
        name=name,
        title=kind.title,
        caption=kind.caption,
        light_png=pngs[0],
        dark_png=pngs[1],
        section=kind.section,
    )


def to_png(figure: Any) -> bytes:
    """The figure as a PNG of a palette: a third of the size, and no eye sees the difference in line art."""
    from PIL import Image  # matplotlib writes its own PNGs with it

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(N_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(out, format="png", optimize=True)
    return out.getvalue()


FIGURES: tuple[Kind, ...] = (
    Kind(
        draw=plots.loss_against_size,
        title="Loss against model size",
        caption="Each colour is one number of training tokens. Dots are finished rows with two standard errors of "
        "the held-out text (often smaller than the dot); straight solid lines are power laws at that D "
        "alone, the shaded band is where the law at the largest D lies with 95 % confidence. Dots leaving "
        "the line in one direction mean the power law bends; a dot far off alone means a rung trained "
        "badly.",
        section="answer",
    ),
    Kind(
        draw=plots.loss_against_compute,
        title="Loss against compute",
        caption="Thin lines are the held-out loss on the way, dots are finished rows, ringed where no cheaper row "
        "does better: that is the frontier. The dashed line is its power law with the 95 % band; below it "
        "there is nothing to be had on this machine with this recipe.",
    ),
    Kind(
        draw=plots.loss_against_tokens,
        title="Loss against tokens",
        caption="Each colour is one rung. Solid lines are power laws through that rung's rows alone; where they "
        "flatten towards the right, the model is too small to use more text.",
    ),
    Kind(
        draw=isoflop_plots.isoflop_curves,
        title="Loss at equal compute",
        caption="Each colour is one budget. Dots are measured losses; where no budget was run at several sizes they "
        "are read between the rows of a size. Dotted is a parabola as in Approach 2 with its minimum, and from four "
        "sizes on its 95 % interval; solid the fitted surface, its star the best size for that budget. A star beside "
        "the dots, not among them, is an extrapolation.",
    ),
    Kind(
        draw=fit_plots.exponents,
        title="The exponent of the best size by every road",
        caption="Dots are estimates of a, bars their 95 % intervals; red lines are Kaplan et al. 2020 and Hoffmann et "
        "al. 2022. Roads that agree support each other; where the bars are long, the points do not decide.",
    ),
    Kind(
        draw=fit_plots.alpha_and_beta,
        title="Draws of the exponents",
        caption="Left: alpha and beta of every resample, the fit itself ringed, published laws in red; on the dashed "
        "line size and data count alike. Right: the exponent a that follows from each resample.",
    ),
    Kind(
        draw=fit_plots.predicted_against_measured,
        title="Predicted against measured",
        caption="The law fitted to the sizes up to the one named, asked for all larger ones. Dots on the line were "
        "predicted; a cloud that bends away with the factor on the right is how far not to extrapolate.",
    ),
    Kind(
        draw=fit_plots.residuals,
        title="Residuals of L(N, D)",
        caption="How far each row lies above (+) or below (-) the fitted L(N, D), in percent of the loss; dots of "
        "equal N or D are drawn side by side. The shaded band is two residual standard deviations. Dots "
        "should scatter around zero without a slope or a bend. The bars are two standard errors of the "
        "held-out text, which all rows share.",
    ),
    Kind(
        draw=fit_plots.on_the_law,
        title="Unfinished runs against the law",
        caption="Held-out loss of runs that are still going (or stopped), relative to what the law and the finished "
        "runs' own trunks lead to expect at the same tokens; shaded is the 95 % band for a single "
        "run, crosses lie outside it.",
    ),
    Kind(
        draw=plots.loss_against_steps,
        title="Loss against steps",
        caption="Training loss of each run, smoothed (raw behind it). Thick lines are trunks at constant learning "
        "rate, thin ones the decays that branch off them; a dot is the held-out loss where a decay ended.",
    ),
    Kind(
        draw=steps_plots.equal_steps_curves,
        title="Every size for the same steps",
        caption="Held-out loss of each run on the way, after its warm-up (the small held-out set); ringed, with two "
        "standard errors, its row (the full set). On the right the same against compute in log-log: solid lines are "
        "least squares through one model's own points on the way, dashed red is a published slope, set through the "
        "model it is of, or else the nearest. Points that leave their line mean that the slope depends on where one "
        "looks.",
        section="steps",
    ),
    Kind(
        draw=batch_plots.noise_against_progress,
        title="Noise scale on the way, and the batch",
        caption="Each colour is one rung. Dots are windows of its runs, diamonds its probe, with 95 % intervals; a "
        "triangle is a lower bound. Dashed is the batch: far below the dots more batch would be free, at their height "
        "it costs about as many tokens again (where the noise scale is calibrated: at c times it).",
        section="batch",
    ),
    Kind(
        draw=batch_plots.speed_against_batch,
        title="Speed against batch",
        caption="Dots are speeds that runs and trials reached on this machine, lines what the trade-off table reckons "
        "with: the cost model, scaled to the dots where there are any. The ring is the batch of each rung. Where a "
        "line is flat, a larger batch saves no time.",
        section="batch",
    ),
    Kind(
        draw=batch_plots.critical_batch_law,
        title="How the critical batch grows",
        caption="The batch that costs about 20 % more tokens than a very small one: 0.2 B_crit, with 95 % intervals; "
        "the line is the law over the ladder with the band of one more rung. Dashed are published rules, each brought "
        "to the same 20 % and asked at these rungs, most of them outside what they were measured at. Compare the "
        "slopes before the heights.",
        section="batch",
    ),
    Kind(
        draw=batch_plots.steps_against_tokens,
        title="Steps against tokens over batches",
        caption="Large dots are batches of the sweep with their best rate, small ones the other rates. The line is "
        "(S/S_min - 1)(E/E_min - 1) = 1; dashed are its ends S_min and E_min with their 95 % intervals, the star is "
        "B_crit, where both are twice their least.",
        section="batch",
    ),
    Kind(
        draw=batch_plots.branches_against_batch,
        title="Branches of one checkpoint",
        caption="Tokens that each batch needed for what the smallest one did with one token, going on from the same "
        "checkpoint. The line is the hyperbola at the fitted B_crit with the band of its interval; a dot far above it "
        "is a batch that needs another rate, or a stretch too short for it.",
        section="batch",
    ),
    Kind(
        draw=evals.scores,
        title="Scores against loss and compute",
        caption="A dot is a model with its 95 % interval, each colour one size; to the right the loss falls and the "
        "compute grows. A score that stays at chance while the loss falls is beyond models of this size; one that "
        "follows the loss is predicted by the law, as far as the line goes.",
        section="evals",
    ),
)
