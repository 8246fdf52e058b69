"""Points for the fitter: from a lab's records or from a CSV, checked row by row, with nothing dropped silently."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from homelab_scaling.errors import DataError
from homelab_scaling.runs import Excluded, LossPoint, read_runs, why_not_corrected

Count = Literal["total", "body", "body+head"]
Compute = Literal["c", "c_min"]
"""C as it was spent, or what a batch far below critical would have needed for the same loss (Kaplan's axis)."""

MAX_ROWS = 100_000
POSITIVE = ("n_params", "n_tokens", "loss_nats", "flops", "n_body", "n_embed", "n_tokens_unique", "bpb", "c_min_flops")
NOT_NEGATIVE = ("n_head", "n_pos", "loss_se_nats", "usd", "kwh", "s_min_steps")
WHOLE = ("seed", "n_tokens_unique", "n_body", "n_head", "n_embed", "n_pos")
TEXT = ("row_id", "run_id", "schedule", "data_id", "family", "start")
_DECIMAL = re.compile(r"^(\s*[+-]?\d+),(\d+(?:[eE][+-]?\d+)?\s*)$")
FIELDS = tuple(f.name for f in dataclasses.fields(LossPoint))


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """Points, what is not one, and what was done on the way in."""

    source: str
    points: tuple[LossPoint, ...]
    excluded: tuple[Excluded, ...]
    notes: tuple[str, ...] = ()
    why_no_c_min: str | None = None
    """Why no row has its C_min, where that is known."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows of a table, under which names."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our column name -> the file's."""
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    """File column -> the value a row must have."""
    drop_highest_loss: int = 0


def read_points(source: Path, selection: Selection | None = None) -> PointTable:
    """The points of a lab folder or a CSV file.

    Raises:
        DataError: naming row and column of the first thing that cannot be a point.
    """
    selection = selection or Selection()
    if source.is_dir():
        if selection.columns or selection.where:
            raise DataError(f"{source}: --columns and --where are for CSV files, and this is a folder; drop them")
        points, excluded = read_runs(source)
        table = PointTable(
            source=source.name or str(source),
            points=tuple(points),
            excluded=tuple(excluded),
            why_no_c_min=why_not_corrected(source),
        )
    else:
        table = _read_csv(source, selection)
    return checked(table, drop_highest_loss=selection.drop_highest_loss)


def checked(table: PointTable, *, drop_highest_loss: int = 0) -> PointTable:
    """The rows that a law can be fitted to; what is dropped is among the excluded.

    Raises:
        DataError: too few are left, or they do not belong together.
    """
    table = _drop_highest(_drop_unfinished(table), drop_highest_loss)
    check_points(table)
    return table


def parse_pairs(pairs: tuple[str, ...], flag: str) -> dict[str, str]:
    """`name=value` texts as a dict.

    Raises:
        DataError: an entry has no `=`, or a name is there twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise DataError(f"{flag} {pair}: wants name=value, for example {flag} loss_nats=val_loss")
        if name.strip() in found:
            raise DataError(f"{flag} {pair}: {name.strip()} is given twice; keep one")
        found[name.strip()] = value.strip()
    return found


# ----------------------------------------------------------------------------------------------------------------- CSV


def _read_csv(path: Path, selection: Selection) -> PointTable:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            separator = _separator(file.readline())
            file.seek(0)
            return _parse_csv(path, csv.reader(file, delimiter=separator), selection, decimal_comma=separator == ";")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or lab; give a points CSV or a lab's folder") from None
    except PermissionError:
        raise DataError(f"{path}: may not be read; change its permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); save it as comma-separated text") from None


def _separator(header: str) -> str:
    """A spreadsheet's semicolon or tab, where the header has no comma."""
    return next((mark for mark in ";\t" if mark in header and "," not in header), ",")


def _point_for_comma(column: str, cell: str) -> str:
    """3,14 as 3.14; not in a count, whose comma would be one of thousands."""
    is_count = column in WHOLE or column in ("n_params", "n_tokens")
    return cell if is_count else _DECIMAL.sub(r"\1.\2", cell)


def _parse_csv(
    path: Path, reader: Iterator[list[str]], selection: Selection, *, decimal_comma: bool = False
) -> PointTable:
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise DataError(f"{path}: the file is empty; wants a header line with n_params,n_tokens,loss_nats")
    at = _locate(path, header, selection)
    derive_tokens = "n_tokens" not in at
    points, n_rows = [], 0
    for number, cells in enumerate(reader, start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(header)}; mend or remove that row"
            )
        if any(not same_value(cells[header.index(c)].strip(), v) for c, v in selection.where.items()):
            continue
        n_rows += 1
        if n_rows > MAX_ROWS:
            raise DataError(
                f"{path}: row {number} is one more than {MAX_ROWS:,} rows; a law wants one row per finished run, "
                "so drop the checkpoints or choose rows with --where"
            )
        row = {name: cells[i].strip() for name, i in at.items()}
        if decimal_comma:
            row = {name: _point_for_comma(name, cell) for name, cell in row.items()}
        points.append(_point(path, number, row, derive_tokens))
    if not points:
        chosen = " and ".join(f"{c}={v}" for c, v in selection.where.items())
        raise DataError(
            f"{path}: no row has {chosen}; look at that column's values"
            if chosen
            else f"{path}: a header but no row; add at least three points"
        )
    notes = ("n_tokens was missing and derived as flops / (6 n_params)",) if derive_tokens else ()
    return PointTable(source=path.name, points=tuple(points), excluded=(), notes=notes)


def _locate(path: Path, header: list[str], selection: Selection) -> dict[str, int]:
    """Our column name -> its index, with --columns applied."""
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]} is there twice; rename one")
    for ours, theirs in selection.columns.items():
        if ours not in FIELDS:
            raise DataError(f"--columns {ours}={theirs}: we know no column {ours}; choose among {', '.join(FIELDS)}")
        if theirs not in header:
            raise DataError(f"{path}: no column {theirs} (--columns {ours}={theirs}); it has {', '.join(header)}")
    for name in selection.where:
        if name not in header:
            raise DataError(f"{path}: no column {name} (--where); it has {', '.join(header)}")
    at = {name: header.index(name) for name in FIELDS if name in header}
    at.update({ours: header.index(theirs) for ours, theirs in selection.columns.items()})
    for name in ("n_params", "loss_nats"):
        if name not in at:
            if any(column.endswith("__MIN") for column in header):
                raise DataError(
                    f"{path}: this is a chart as W&B exports it, a column per run; export the table of runs, or "
                    "use --from-wandb ENTITY/PROJECT"
                )
            raise DataError(
                f"{path}: no column {name}; it has {', '.join(header)}, so name the right one with --columns {name}=..."
            )
    if "n_tokens" not in at and "flops" not in at:
        raise DataError(f"{path}: no column n_tokens and no flops to derive it from; add one or use --columns")
    return at


def same_value(cell: str, wanted: str) -> bool:
    """Whether a cell is what a flag wants: as text, or as a number."""
    if cell == wanted:
        return True
    try:
        return float(cell) == float(wanted)
    except ValueError:
        return False


def _point(path: Path, number: int, cells: dict[str, str], derive_tokens: bool) -> LossPoint:
    values: dict[str, object] = {}
    for name, cell in cells.items():
        if name == "decayed":
            values[name] = _truth(path, number, cell)
        elif name in TEXT:
            values[name] = cell or None
        else:
            values[name] = _number(path, number, name, cell)
    if derive_tokens:
        flops, n_params = values["flops"], values["n_params"]
        if not isinstance(flops, float) or not isinstance(n_params, float):
            raise DataError(f"{path}: row {number} has neither n_tokens nor flops; fill one in")
        values["n_tokens"] = flops / (6 * n_params)
    for name in ("n_params", "n_tokens", "loss_nats"):
        if values[name] is None:
            raise DataError(f"{path}: row {number}, column {name} is empty; fill it in or remove that row")
    if values.get("row_id") is None:
        values["row_id"] = f"row {number}"
    return LossPoint(**values)  # type: ignore[arg-type]


def _number(path: Path, number: int, name: str, cell: str) -> float | int | None:
    if cell == "":
        return None
    where = f"{path}: row {number}, column {name}"
    try:
        value = float(cell)
    except ValueError:
        raise DataError(f"{where} is {cell[:40]!r}, wants a number; mend or remove that row") from None
    if fault := fault_of(name, value):
        raise DataError(f"{where} is {cell}, {fault}; mend or remove that row")
    return round(value) if name in WHOLE else value


def fault_of(column: str, value: float) -> str | None:
    """What a column wants that this number is not; None where it may stand there."""
    if not math.isfinite(value):
        return "wants a finite number"
    if column in POSITIVE and value <= 0:
        return "wants a number above 0"
    if column in NOT_NEGATIVE and value < 0:
        return "wants 0 or more"
    if column in WHOLE and abs(value) > 1e18:
        return "too large for a count"
    return None


def _truth(path: Path, number: int, cell: str) -> bool | None:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": None}
    if cell.lower() not in known:
        raise DataError(f"{path}: row {number}, column decayed is {cell[:40]!r}, wants true or false; mend that row")
    return known[cell.lower()]


def points_csv(points: Sequence[LossPoint]) -> str:
    """The points as a CSV that `read_points` gives back as they were; columns that no point has are left out."""
    used = [name for name in FIELDS if any(getattr(p, name) is not None for p in points)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(used)
    for point in points:
        cells = [getattr(point, name) for name in used]
        writer.writerow(["" if c is None else str(c).lower() if isinstance(c, bool) else c for c in cells])
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- checks


def _drop_unfinished(table: PointTable) -> PointTable:
    """Rows measured before the learning rate had decayed obey another law."""
    gone = tuple(
        Excluded(row_id=_name(p, i), reason="its learning rate had not decayed; such a loss obeys another law")
        for i, p in enumerate(table.points)
        if p.decayed is False
    )
    if not gone:
        return table
    kept = tuple(p for p in table.points if p.decayed is not False)
    return dataclasses.replace(table, points=kept, excluded=table.excluded + gone)


def _drop_highest(table: PointTable, k: int) -> PointTable:
    if k == 0:
        return table
    if not 0 < k < len(table.points):
        raise DataError(f"--drop-highest-loss {k}: the table has {len(table.points)} points; drop 0 or more, not all")
    order = sorted(range(len(table.points)), key=lambda i: table.points[i].loss_nats)
    gone = sorted(order[-k:])
    excluded = tuple(
        Excluded(row_id=_name(table.points[i], i), reason=f"among the {k} highest losses (--drop-highest-loss {k})")
        for i in gone
    )
    kept = tuple(p for i, p in enumerate(table.points) if i not in set(gone))
    return dataclasses.replace(table, points=kept, excluded=table.excluded + excluded)


def check_points(table: PointTable) -> None:
    """Refuses what no law can be fitted to.

    Raises:
        DataError: fewer than two points, different texts, the same row twice, or no variation in N and D.
    """
    points = table.points
    if len(points) < 2:
        lost = f" ({len(table.excluded)} excluded: {table.excluded[0].reason})" if table.excluded else ""
        raise DataError(
            f"{table.source}: {len(points)} finished point{'s' if len(points) != 1 else ''}{lost}; "
            "a law needs at least three, so finish more rungs"
        )
    texts = sorted({p.data_id for p in points if p.data_id is not None})
    if len(texts) > 1:
        raise DataError(
            f"{table.source}: rows of {len(texts)} different texts (data_id {', '.join(texts[:3])}); "
            "their losses do not compare, so choose one with --where data_id=..."
        )
    seen: dict[object, str] = {}
    for index, point in enumerate(points):
        name = _name(point, index)
        same = (point.n_params, point.n_tokens, point.loss_nats, point.seed, point.run_id)
        for mark, what in ((point.row_id, "row_id"), (same, "N, D, loss and seed")):
            if mark is None:
                continue
            if mark in seen:
                raise DataError(f"{table.source}: {name} has the same {what} as {seen[mark]}; remove one of the two")
            seen[mark] = name
    if len({(p.n_params, p.n_tokens) for p in points}) == 1:
        raise DataError(
            f"{table.source}: all {len(points)} rows have the same N and D (columns n_params, n_tokens); "
            "a law needs different sizes or token counts"
        )


def _name(point: LossPoint, index: int) -> str:
    return point.row_id or f"point {index + 1}"


def apply_count(points: tuple[LossPoint, ...], count: Count) -> tuple[LossPoint, ...]:
    """The points with n_params counting what was asked for: everything, the body, or body and output head.

    Raises:
        DataError: a row does not say how many parameters its body or head has.
    """
    if count == "total":
        return points
    needed = ("n_body",) if count == "body" else ("n_body", "n_head")
    counted = []
    for index, point in enumerate(points):
        parts = [getattr(point, name) for name in needed]
        for name, part in zip(needed, parts, strict=True):
            if part is None:
                raise DataError(
                    f"{_name(point, index)}, column {name} is empty, and --count {count} needs it on every row; "
                    "fill it in or use --count total"
                )
        counted.append(dataclasses.replace(point, n_params=float(sum(parts))))
    return tuple(counted)


def with_c_min(table: PointTable) -> PointTable:
    """The rows whose C_min is known; the others are left out with the reason.

    Raises:
        DataError: no row has it.
    """
    kept = tuple(p for p in table.points if p.c_min_flops is not None)
    if not kept:
        why = table.why_no_c_min or "its columns have no c_min_flops"
        raise DataError(
            f"{table.source}: no row knows its C_min ({why}); measure the critical batch with `homelab batch-size "
            "LADDER --verify` and fit again, or drop --compute"
        )
    gone = tuple(
        Excluded(row_id=_name(p, i), reason="its C_min is not known: no calibrated critical batch for its rung")
        for i, p in enumerate(table.points)
        if p.c_min_flops is None
    )
    return dataclasses.replace(table, points=kept, excluded=table.excluded + gone)


def apply_compute(points: tuple[LossPoint, ...], compute: Compute) -> tuple[LossPoint, ...]:
    """The points with compute and tokens counted as asked for: as spent, or as at a batch far below critical.

    There a run takes D_min = D / (1 + B / B_crit) tokens and C_min = C / (1 + B / B_crit) FLOPs to the same loss, so
    that C_min = 6 N D_min as far as C = 6 N D.

    Raises:
        DataError: a row does not know its C_min.
    """
    if compute == "c":
        return points
    counted = []
    for index, point in enumerate(points):
        if point.c_min_flops is None:
            raise DataError(f"{_name(point, index)}, column c_min_flops is empty, and --compute c_min needs it")
        share = point.c_min_flops / (point.flops or 6 * point.n_params * point.n_tokens)
        counted.append(dataclasses.replace(point, n_tokens=share * point.n_tokens, flops=point.c_min_flops))
    return tuple(counted)
