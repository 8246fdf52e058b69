"""What a report says of the text: every share that the manifest records, and nothing where there is nothing to say."""

import dataclasses
from types import SimpleNamespace

from homelab_scaling.data import shares
from homelab_scaling.report.corpus import sources
from homelab_scaling.report.document import Grid, Paragraph, to_markdown
from homelab_scaling.specs import CorpusManifest, ShardFile, SourceShare, Split


def share(name: str, n_tokens: int, n_unique: int, **changed: object) -> SourceShare:
    plain = SourceShare(
        name=name,
        epochs=n_tokens / n_unique,
        n_documents=n_unique // 100,
        n_bytes=4 * n_tokens,
        n_tokens=n_tokens,
        n_tokens_unique=n_unique,
        n_val_documents=3,
        n_val_tokens=321,
        n_exact_duplicates=17,
    )
    return dataclasses.replace(plain, **changed)


def told(*mixture: SourceShare, near_duplicates: float | None = None) -> list:
    n = sum(s.n_tokens for s in mixture) or 1000
    split = Split(files=(ShardFile(name="t", n_tokens=n, sha256="x"),), n_tokens=n, n_bytes=4 * n, n_documents=9)
    corpus = CorpusManifest(
        tokenizer="bytes",
        tokenizer_file=None,
        tokenizer_hash="x",
        n_vocab=257,
        eot_id=256,
        dtype="uint16",
        train=split,
        val=split,
        sources=tuple(s.name for s in mixture) or ("a",),
        held_out_rule="",
        n_duplicates_dropped=17 * len(mixture),
        near_duplicates=near_duplicates,
        mixture=mixture,
    )
    return sources(SimpleNamespace(corpus=corpus))


def test_a_mixture_is_a_table_and_a_word_on_repeats() -> None:
    web = share("/text/web.jsonl", 700_000, 700_000, weight=0.7)
    books = share("/text/books.jsonl", 300_000, 60_000, weight=0.3, n_near_duplicates=4)
    grid, words = told(web, books, near_duplicates=0.8)
    assert isinstance(grid, Grid) and isinstance(words, Paragraph)
    page = to_markdown("t", [grid, words])
    for row in shares.rows(SimpleNamespace(mixture=(web, books), train=SimpleNamespace(n_tokens=10**6))):
        assert all(cell in page for cell in row)
    assert "books.jsonl 5.0 times: 1.00M tokens, of which 760k are different" in page
    assert "books.jsonl is beyond." in page
    assert "34 exact duplicates dropped, 4 near duplicates (Jaccard 0.8 or more)" in page


def test_two_sources_without_repeats_are_a_table_alone() -> None:
    (grid,) = told(share("a.txt", 500, 500), share("b.txt", 500, 500))
    assert isinstance(grid, Grid) and [row[1] for row in grid.rows] == ["all", "all"]
    assert "near duplicates not looked for" in (grid.caption or "")


def test_few_repeats_are_not_called_too_many() -> None:
    _grid, words = told(share("a.txt", 1300, 1000), share("b.txt", 500, 500))
    assert "a.txt 1.3 times" in words.text and "beyond." not in words.text


def test_one_text_once_needs_no_table() -> None:
    assert told(share("python", 1000, 1000)) == []
    assert told() == []
    assert sources(SimpleNamespace(corpus=None)) == []
    (words,) = told(share("python", 1000, 1000), near_duplicates=0.8)
    assert "17 exact duplicates dropped, 0 near duplicates" in words.text
