"""What the monitor remembers of one run's metrics.jsonl, however long it grows."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from homelab_scaling.watch.frame import Held, NoiseNow, Point

MAX_POINTS = 600
MAX_RATES = 20_000


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The speed of one log interval."""

    update: int
    """Updates done at its end."""
    interval_s: float
    interval_tokens: int
    mfu_frac: float | None = None
    vram_bytes: int | None = None
    power_w: float | None = None
    """Of all the run's cards; None where nothing was measured."""
    energy_j: float | None = None
    """Theirs so far, over all segments, pauses included."""
    slept_s: float = 0.0
    """Between steps on the watchdog's order so far, over all segments; not in `interval_s`."""

    @property
    def tokens_per_s(self) -> float:
        return self.interval_tokens / self.interval_s


class RunLog:
    """Fed with lines as they come; holds a thinned loss curve, every validation and the last rates."""

    def __init__(self) -> None:
        self.rates: deque[Rate] = deque(maxlen=MAX_RATES)
        self.held: list[dict[str, Any]] = []
        """Validation lines as they are."""
        self.update = 0
        """Updates done, by the last line."""
        self.tokens = 0
        """On the path to the current weights, by the last line."""
        self.loss: float | None = None
        """Of the last batch; None before the first and after one that was not finite."""
        self.lr: float | None = None
        self.phase: str | None = None
        self.noise_scale_tokens: float | None = None
        self.noise: NoiseNow | None = None
        """Of the last window that gave a number or a bound."""
        self._points: list[_Bin] = []
        self._per_bin = 1

    def feed(self, lines: Iterable[dict[str, Any]]) -> None:
        """Takes lines in; one that lacks what its kind needs is passed over."""
        for line in lines:
            self.noise_scale_tokens = number(line.get("noise_scale_tokens")) or self.noise_scale_tokens
            kind, loss, tokens = line.get("kind"), number(line.get("loss")), number(line.get("tokens"))
            if kind == "step" and isinstance(line.get("update"), int):
                self._step(line, loss, tokens)
            elif kind == "rate":
                self._rate(line)
            elif kind == "noise" and tokens is not None:
                self._noise(line, int(tokens))
            elif kind == "val" and loss is not None and tokens is not None:
                self.held.append(line)

    @property
    def curve(self) -> tuple[Point, ...]:
        """The loss of training batches over the whole run, thinned by averaging neighbours."""
        return tuple(
            Point(update=one.update, tokens=one.tokens, loss=one.total / one.n, decay=one.decay) for one in self._points
        )

    @property
    def held_curve(self) -> tuple[Held, ...]:
        return tuple(
            Held(
                tokens=int(line["tokens"]),
                loss_nats=float(line["loss"]),
                se_nats=number(line.get("loss_se")),
                full=line.get("set") == "full",
            )
            for line in self.held
        )

    def _step(self, line: dict[str, Any], loss: float | None, tokens: float | None) -> None:
        update: int = line["update"]
        self.update, self.phase = update + 1, str(line.get("phase", "trunk"))
        self.lr, self.loss, self.tokens = number(line.get("lr")), loss, int(tokens or self.tokens)
        if loss is None or tokens is None:
            return
        decay = self.phase.startswith("decay")
        last = self._points[-1] if self._points else None
        if last is not None and last.n < self._per_bin and last.decay == decay:
            last.add(update, int(tokens), loss)
        else:
            self._points.append(_Bin(update, int(tokens), loss, decay))
        if len(self._points) > MAX_POINTS:
            self._points = _halved(self._points)
            self._per_bin *= 2

    def _noise(self, line: dict[str, Any], tokens: int) -> None:
        value, least = number(line.get("noise_scale_tokens")), number(line.get("noise_at_least_tokens"))
        if value is None and least is None:
            return
        self.noise = NoiseNow(
            at_tokens=tokens,
            tokens=value,
            low_tokens=number(line.get("noise_low_tokens")),
            high_tokens=number(line.get("noise_high_tokens")),
            at_least_tokens=least,
            why=str(line["why"]) if line.get("why") else None,
        )

    def _rate(self, line: dict[str, Any]) -> None:
        seconds, tokens, update = (
            number(line.get("interval_s")),
            number(line.get("interval_tokens")),
            line.get("update"),
        )
        if not (seconds and tokens and seconds > 0 and tokens > 0 and isinstance(update, int)):
            return
        vram = number(line.get("vram_bytes"))
        self.rates.append(
            Rate(
                update=update,
                interval_s=seconds,
                interval_tokens=int(tokens),
                mfu_frac=number(line.get("mfu")),
                vram_bytes=None if vram is None else int(vram),
                power_w=number(line.get("power_w")),
                energy_j=number(line.get("energy_j")),
                slept_s=number(line.get("slept_s")) or 0.0,
            )
        )


class _Bin:
    """Neighbouring steps in one point, which stands at the last of them."""

    __slots__ = ("decay", "n", "tokens", "total", "update")

    def __init__(self, update: int, tokens: int, loss: float, decay: bool) -> None:
        self.update, self.tokens, self.total, self.n, self.decay = update, tokens, loss, 1, decay

    def add(self, update: int, tokens: int, loss: float, n: int = 1) -> None:
        self.update, self.tokens = update, tokens
        self.total += loss
        self.n += n


def _halved(points: Sequence[_Bin]) -> list[_Bin]:
    kept: list[_Bin] = []
    joined = True
    for one in points:
        if not joined and kept[-1].decay == one.decay:
            kept[-1].add(one.update, one.tokens, one.total, one.n)
            joined = True
        else:
            kept.append(one)
            joined = False
    return kept


def number(value: object) -> float | None:
    """The value if it is a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
