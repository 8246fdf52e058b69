"""The table of a corpus's sources in words, the same in `homelab corpus` and in a report."""

from homelab_scaling.specs import CorpusManifest, SourceShare

HEAD = ("source", "asked", "documents", "bytes", "share", "epochs", "tokens", "of tokens", "held out", "dropped")
BRIEF = 7
"""So many columns fit a terminal; the others are for a page."""


def rows(manifest: CorpusManifest) -> list[tuple[str, ...]]:
    """A line under HEAD for each source."""
    n_bytes = sum(share.n_bytes for share in manifest.mixture)
    names = short_names(tuple(share.name for share in manifest.mixture))
    return [
        (
            name,
            _asked(share),
            f"{share.n_documents:,}",
            f"{share.n_bytes:,}",
            f"{share.n_bytes / n_bytes:.1%}",
            f"{share.epochs:.2f}",
            f"{share.n_tokens:,}",
            f"{share.n_tokens / manifest.train.n_tokens:.1%}",
            f"{share.n_val_tokens:,}",
            f"{share.n_exact_duplicates + share.n_near_duplicates:,}",
        )
        for name, share in zip(names, manifest.mixture, strict=True)
    ]


def short_names(names: tuple[str, ...]) -> list[str]:
    """Sources by the ends of their paths, as much of them as tells them apart."""
    parts = [[name] if name.startswith("hf:") else name.rstrip("/").split("/") for name in names]
    for length in range(1, max(map(len, parts), default=1)):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def _asked(share: SourceShare) -> str:
    if share.weight is not None:
        return f"{share.weight:.1%}"
    asked = share.epochs_asked
    return "all" if asked is None else f"{asked:g} epoch{'' if asked == 1 else 's'}"


def repeated(manifest: CorpusManifest) -> list[tuple[str, float]]:
    """(name, epochs) of the sources that stand in the training text more than once, the most repeated first."""
    names = short_names(tuple(share.name for share in manifest.mixture))
    found = [(name, share.epochs) for name, share in zip(names, manifest.mixture, strict=True) if share.epochs > 1]
    return sorted(found, key=lambda item: -item[1])


def dropped_words(manifest: CorpusManifest) -> str:
    """How many duplicates went, and whether near ones were looked for."""
    exact = manifest.n_duplicates_dropped
    said = f"{exact:,} exact duplicate{'' if exact == 1 else 's'} dropped"
    if manifest.near_duplicates is None:
        return f"{said}, near duplicates not looked for"
    near = sum(share.n_near_duplicates for share in manifest.mixture)
    return f"{said}, {near:,} near duplicate{'' if near == 1 else 's'} (Jaccard {manifest.near_duplicates:g} or more)"
