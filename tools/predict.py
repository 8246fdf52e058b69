"""Predicts from a fit: loss, best split of a budget, tokens for a size, serving; with interval and reach."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError

if TYPE_CHECKING:
    from homelab_scaling.fit.family import ShapeFamily
    from homelab_scaling.fit.result import FitReport
    from homelab_scaling.fit.serving import Machine


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which fit, and what is asked of it; without a question, the split of three budgets."""

    fit: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIT")]
    """A lab, a fit.json or its folder, or a published law such as hoffmann-2022."""
    law: str | None = None
    """Which of its laws; the one that held-out runs chose when not given."""
    params: float | None = None
    """N: alone, the tokens for which it is compute-optimal; with --tokens, the loss and what more tokens buy."""
    tokens: float | None = None
    """D: alone, the size for which it is compute-optimal."""
    flops: float | None = None
    """C: its best split, beside 20 tokens per parameter."""
    steps: float | None = None
    """S_min, for the law kaplan-s."""
    unique_tokens: float | None = None
    """How many of --tokens are different ones, for a law of repeated data; all when not given."""
    worth: str = "1%"
    """The least that a doubling of the tokens has to gain: a share of the loss, or nats such as 0.02."""
    quality_of: float | None = None
    """For serving: as good as a model of so many parameters, trained on --tokens or on its compute-optimal tokens."""
    quality_loss: float | None = None
    """Instead, a loss to reach: with --params its tokens, else the cheapest model."""
    inference_tokens: float | None = None
    """Tokens the model will serve over its life."""
    train_mfu: float | None = None
    """Share of the peak that training reaches; this and the prices add the optimum in money."""
    serve_mfu: float | None = None
    """Share of the peak that serving reaches."""
    train_peak: str | None = None
    """FLOP/s such as 97.5e12, or a card such as "RTX 4080"."""
    serve_peak: str | None = None
    """As training's when not given."""
    train_usd_hour: float | None = None
    """Price of an hour of the training hardware whose peak that is."""
    serve_usd_hour: float | None = None
    """As training's when not given."""
    layers: int | None = None
    """With --width and --context: the KV cache of this shape."""
    width: int | None = None
    """d_model of that shape."""
    context: int | None = None
    """Tokens of a sequence; a lab's own when not given."""
    vocab: int | None = None
    """With --context: exact FLOPs over GPT-2 shapes of this vocabulary beside 6 N D; a lab's own when not given."""
    kv_bytes: float = 2.0
    """Bytes of one element of weights and cache: 2 for bf16, 1 for fp8."""
    json: bool = False
    """Print the answers as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.fit.answers import Questions, predict
    from homelab_scaling.fit.catalogue import open_fit

    report = open_fit(args.fit)
    questions = Questions(
        params=args.params,
        tokens=args.tokens,
        flops=args.flops,
        steps=args.steps,
        unique_tokens=args.unique_tokens,
        worth=args.worth,
        quality_of=args.quality_of,
        quality_loss=args.quality_loss,
        inference_tokens=args.inference_tokens,
        machines=_machines(args),
        layers=args.layers,
        width=args.width,
        context=args.context,
        kv_bytes=args.kv_bytes,
        family=_family(args, report),
    )
    made = predict(report, questions, args.law)
    if args.json:
        print(codec.dumps(made))
        return 0
    from rich.console import Console

    from homelab_scaling.fit.predict_page import prediction_page

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 100
    for part in prediction_page(made):
        console.print(part)
    return 0


def _family(args: Args, report: "FitReport") -> "ShapeFamily | None":
    """The shapes of --vocab and --context, or of the lab the fit belongs to."""
    from dataclasses import replace

    from homelab_scaling.fit.family import ShapeFamily, lab_family
    from homelab_scaling.fit.predict import count_of

    own = lab_family(args.fit, count_of(report))
    if own is not None:
        return replace(own, n_vocab=args.vocab or own.n_vocab, context_tokens=args.context or own.context_tokens)
    if args.vocab is None:
        return None
    if args.context is None:
        raise SpecError("exact FLOPs need the context as well as the vocabulary; give --context")
    return ShapeFamily(n_vocab=args.vocab, context_tokens=args.context, count=count_of(report))


def _machines(args: Args) -> "tuple[Machine, Machine] | None":
    """What trains and what serves; None where no price or speed is given."""
    from homelab_scaling.fit.serving import Machine, parse_peak

    needed = ("train_mfu", "serve_mfu", "train_peak", "train_usd_hour")
    given = [name for name in (*needed, "serve_peak", "serve_usd_hour") if getattr(args, name) is not None]
    if not given:
        return None
    missing = ", ".join(f"--{name.replace('_', '-')}" for name in needed if name not in given)
    if missing or args.train_mfu is None or args.serve_mfu is None:
        raise SpecError(f"a cost in money needs both MFUs, a peak and a price; {missing} missing")
    assert args.train_peak is not None and args.train_usd_hour is not None
    trains = Machine(
        peak_flops_per_s=parse_peak(args.train_peak), mfu_frac=args.train_mfu, usd_per_hour=args.train_usd_hour
    )
    serves = Machine(
        peak_flops_per_s=parse_peak(args.serve_peak or args.train_peak),
        mfu_frac=args.serve_mfu,
        usd_per_hour=args.train_usd_hour if args.serve_usd_hour is None else args.serve_usd_hour,
    )
    return trains, serves


if __name__ == "__main__":
    raise SystemExit(cli.main(["predict", *sys.argv[1:]]))
