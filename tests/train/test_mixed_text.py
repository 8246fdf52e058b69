"""A row counts the different tokens that it met, not those that it read."""

import dataclasses
from pathlib import Path

from toy_run import make_toy_run, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.specs import SourceShare


def test_rows_say_how_many_tokens_were_different(tmp_path: Path) -> None:
    plain = write_shards(tmp_path / "shards")
    n = plain.train.n_tokens
    share = SourceShare(
        name="toy",
        epochs=4.0,
        n_documents=100,
        n_bytes=3 * n,
        n_tokens=n,
        n_tokens_unique=n // 4,
        n_val_documents=40,
        n_val_tokens=plain.val.n_tokens,
        n_exact_duplicates=0,
    )
    mixed = dataclasses.replace(plain, mixture=(share,))
    codec.write_json(tmp_path / "shards" / "manifest.json", mixed)
    assert mixed.data_id == plain.data_id, "the table does not rename the text"
    spec, folder = make_toy_run(tmp_path, mixed, horizons=(10, 40))
    rows = train_here(spec, folder).rows
    assert [row.n_tokens_unique for row in rows] == [mixed.unique_tokens(row.n_tokens) for row in rows]
    for row in rows:
        f = row.n_tokens / n
        assert abs(row.n_tokens_unique - n / 4 * (1 - (1 - f) ** 4)) < 3
        assert row.n_tokens_unique < min(row.n_tokens, n // 4)
