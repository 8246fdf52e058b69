"""Text to token shards that nanoGPT can read, with a manifest that says what they hold."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from homelab_scaling import cli
from homelab_scaling.errors import DataError
from homelab_scaling.specs import NEARLY_AS_GOOD_EPOCHS, CorpusManifest

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Args:
    """Turns text into train.bin, val.bin and manifest.json."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """.txt, .jsonl or .parquet files, folders of them, `python` (the standard library, torch, numpy, scipy),
    `hf:NAME[:CONFIG]`; or one folder of nanoGPT or llm.c .bin files, to give it a manifest."""
    tokenizer: str
    """`bytes`, `bpe:N` (trained on this text, such as bpe:4096), `gpt2`, or the path of a tokenizer.json."""
    out: Path
    """Folder to make; a finished corpus of the same request is kept."""
    text_field: str = "text"
    """Which field of .jsonl, .parquet and hub rows holds the text."""
    val_frac: float = 0.02
    """Share of the documents held out for validation, chosen by content hash."""
    max_bytes: int | None = None
    """Use at most this many bytes of text, repetitions counted, spread over the sources by hash (of a hub stream: its
    beginning)."""
    weights: tuple[float, ...] = ()
    """Parts of the training bytes, one per source in order, such as `--weights 0.7 0.3`. Under --max-bytes a source too
    small for its part is repeated; without, the corpus is the largest in which none is."""
    epochs: tuple[float, ...] = ()
    """Or: how often each source is in the training text, in order, such as `--epochs 1 2.5`."""
    near_duplicates: float | None = None
    """Drop documents this similar to another one: Jaccard of their sets of five words in a row, 0.8 as a rule."""
    workers: int | None = None
    """Processes that encode; one per core if not given."""
    n_vocab: int | None = None
    """Vocabulary of .bin files that have no manifest (gpt2 is known)."""
    eot_id: str | None = None
    """End-of-text id of such files, or none."""
    json: bool = False
    """Print the manifest as JSON instead of a table."""


def main(args: Args) -> int:
    from homelab_scaling import codec
    from homelab_scaling.data.progress import show_progress
    from homelab_scaling.data.shards import build_shards

    with show_progress() as progress:
        manifest = build_shards(
            args.sources,
            args.tokenizer,
            args.out,
            text_field=args.text_field,
            val_frac=args.val_frac,
            max_bytes=args.max_bytes,
            weights=args.weights,
            epochs=args.epochs,
            near_duplicates=args.near_duplicates,
            n_workers=args.workers,
            n_vocab=args.n_vocab,
            eot_id=_eot_id(args.eot_id),
            progress=progress,
        )
    if args.json:
        print(codec.dumps({**codec.to_plain(manifest), "data_id": manifest.data_id, "folder": str(args.out)}))
    else:
        _print_table(manifest, args.out)
    return 0


def _eot_id(flag: str | None) -> Any:
    if flag is None or flag == "none":
        return flag
    if not flag.isdecimal():
        raise DataError(f"--eot-id {flag}: wants a token id or none")
    return int(flag)


def _print_table(manifest: CorpusManifest, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from homelab_scaling.data import shares

    table = Table(title=f"{out}  ({manifest.tokenizer}, {manifest.n_vocab:,} ids, {manifest.dtype})")
    table.add_column("")
    for name in ("tokens", "bytes", "bytes/token", "documents"):
        table.add_column(name, justify="right")
    for name, split in (("train", manifest.train), ("held out", manifest.val)):
        ratio = "unknown" if split.n_bytes is None else f"{split.n_bytes / split.n_tokens:.3f}"
        table.add_row(name, f"{split.n_tokens:,}", _count(split.n_bytes), ratio, _count(split.n_documents))
    console = Console()
    console.print(table)
    if len(manifest.mixture) > 1 or manifest.n_tokens_unique < manifest.train.n_tokens:
        console.print(_sources_table(manifest))
    for name, epochs in shares.repeated(manifest):
        if epochs > NEARLY_AS_GOOD_EPOCHS:
            console.print(
                f"{name} is read {epochs:.1f} times in one pass over this text: up to {NEARLY_AS_GOOD_EPOCHS} times is "
                "nearly as good as new text, beyond that it is worth ever less",
                highlight=False,
                soft_wrap=True,
            )
    share = manifest.val.n_tokens / (manifest.val.n_tokens + manifest.train.n_tokens)
    console.print(
        f"held out {share:.2%} of the tokens; {shares.dropped_words(manifest)}; data_id {manifest.data_id}",
        highlight=False,
        soft_wrap=True,
    )


def _sources_table(manifest: CorpusManifest) -> "Table":
    from rich.table import Table

    from homelab_scaling.data import shares

    table = Table(title="training text by source, repetitions counted")
    for number, name in enumerate(shares.HEAD[: shares.BRIEF]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in shares.rows(manifest):
        table.add_row(*row[: shares.BRIEF])
    return table


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


if __name__ == "__main__":
    raise SystemExit(cli.main(["corpus", *sys.argv[1:]]))
