"""The order of windows, the reading of windows, the fixed windows of validation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.data.batches import (
    BatchOrder,
    TokenStream,
    document_ids,
    n_windows,
    read_windows,
    validation_windows,
)
from homelab_scaling.errors import DataError

props = settings(derandomize=True, deadline=None, max_examples=200)
sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31)


@props
@given(n=sizes, seed=seeds, epoch=st.integers(0, 50))
def test_every_epoch_visits_every_window_once(n: int, seed: int, epoch: int) -> None:
    visited = BatchOrder(n, seed).windows(epoch * n, n)
    assert visited.dtype == np.int64
    assert np.array_equal(np.sort(visited), np.arange(n))


@pytest.mark.parametrize("n", [*range(1, 130), 65_535, 65_536, 65_537])
def test_no_size_is_special(n: int) -> None:
    assert np.array_equal(np.sort(BatchOrder(n, 7).windows(0, n)), np.arange(n))


@props
@given(n=sizes, seed=seeds, first=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_slicing_gives_the_same_stream(n: int, seed: int, first: int, cuts: list[int]) -> None:
    """Ranks, micro-steps, batch sizes and resumes only cut the stream; a shorter run is a prefix of a longer one."""
    order = BatchOrder(n, seed)
    whole = order.windows(first, sum(cuts))
    starts = first + np.cumsum([0, *cuts])
    parts = [BatchOrder(n, seed).windows(int(s), c) for s, c in zip(starts, cuts, strict=False)]
    assert np.array_equal(np.concatenate([*parts, np.empty(0, np.int64)]), whole)
    one_by_one = [int(order.windows(first + i, 1)[0]) for i in range(min(5, len(whole)))]
    assert one_by_one == whole[:5].tolist()


def test_ranks_and_accumulation_slice_one_batch() -> None:
    order, batch = BatchOrder(1000, 3), 64
    whole = order.windows(5 * batch, batch)
    for world, micro in ((1, 64), (2, 8), (4, 16)):
        rows = []
        for rank in range(world):
            per_rank = batch // world
            rows += [order.windows(5 * batch + rank * per_rank + i, micro) for i in range(0, per_rank, micro)]
        assert np.array_equal(np.concatenate(rows), whole)


def test_epochs_and_seeds_differ_and_look_shuffled() -> None:
    n = 5000
    first, second = BatchOrder(n, 0).windows(0, n), BatchOrder(n, 0).windows(n, n)
    other = BatchOrder(n, 1).windows(0, n)
    for a, b in ((first, second), (first, other), (second, other), (first, np.arange(n))):
        assert np.mean(a == b) < 0.005  # chance: 1 in 5000
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / np.sqrt(n)


def test_a_small_order_reaches_every_place_evenly() -> None:
    """A fair shuffle puts each of 10 windows in each of 10 places in a tenth of all seeds."""
    orders = np.array([BatchOrder(10, seed).windows(0, 10) for seed in range(2000)])
    share = np.array([[np.mean(orders[:, place] == window) for window in range(10)] for place in range(10)])
    assert np.abs(share - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 2000)


def test_the_order_is_pinned() -> None:
    """A change here would silently give every resumed run other data."""
    assert BatchOrder(10, 0).windows(0, 20).tolist() == PINNED
    assert BatchOrder(10**9, 42).windows(123_456_789_012, 3).tolist() == PINNED_LARGE


PINNED = [7, 8, 5, 0, 1, 4, 6, 9, 3, 2, 5, 6, 4, 0, 3, 1, 2, 7, 8, 9]
PINNED_LARGE = [148152849, 735235654, 481489998]


def test_no_window_is_an_error() -> None:
    with pytest.raises(DataError, match="shorter than one window"):
        BatchOrder(0, 0)


@props
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), context=st.integers(1, 20), data=st.data())
def test_windows_are_slices_of_the_concatenation(lengths: list[int], context: int, data: st.DataObject) -> None:
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    stream = TokenStream(np.split(tokens, np.cumsum(lengths)[:-1]))
    have = n_windows(len(stream), context)
    assert have * context + 1 <= len(stream) < (have + 1) * context + 1
    ids = data.draw(st.lists(st.integers(0, have - 1), max_size=6)) if have else []
    windows = read_windows(stream, ids, context)
    assert windows.shape == (len(ids), context + 1) and windows.dtype == np.uint16
    for window, i in zip(windows, ids, strict=True):
        assert np.array_equal(window, tokens[i * context : (i + 1) * context + 1])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens)))))
    assert np.array_equal(stream[start:stop], tokens[start:stop])


def test_reading_a_memory_map_leaves_the_rest_of_the_file_alone(tmp_path) -> None:
    """The trap this module avoids: np.take on a strided view of a memory map copies the whole file first."""
    import tracemalloc

    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        file.truncate(2**28)  # sparse: 128 M tokens
    stream = TokenStream([np.memmap(path, dtype=np.uint16, mode="r")])
    tracemalloc.start()
    read_windows(stream, [5, 130_000, 7], 1024)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000


@props
@given(length=st.integers(2, 5000), context=st.integers(1, 64), n_tokens=st.integers(1, 6000))
def test_validation_windows_are_fixed_spread_and_inside(length: int, context: int, n_tokens: int) -> None:
    have = n_windows(length, context)
    if have == 0:
        with pytest.raises(DataError, match="one window wants"):
            validation_windows(length, context, n_tokens)
        return
    ids = validation_windows(length, context, n_tokens)
    assert len(ids) == min(have, max(1, n_tokens // context))
    assert ids[0] == 0 and ids[-1] < have
    gaps = np.diff(ids)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_document_ids_by_hand() -> None:
    end = 9
    #                  0  1  2  3  4  5  6  7  8  9  10
    tokens = np.array([1, 9, 2, 3, 9, 9, 4, 5, 6, 9, 7], dtype=np.uint16)
    ids = document_ids(TokenStream([tokens[:3], tokens[3:]]), [0, 1], 5, end)
    # targets are tokens 1..5 and 6..10; an end belongs to the document it ends
    assert ids.tolist() == [[0, 1, 1, 1, 2], [3, 3, 3, 3, 4]]


@props
@given(tokens=st.lists(st.integers(0, 3), min_size=4, max_size=60), context=st.integers(1, 8))
def test_document_ids_count_the_ends_before_a_target(tokens: list[int], context: int) -> None:
    stream = TokenStream([np.array(tokens, dtype=np.uint16)])
    windows = np.arange(n_windows(len(tokens), context))
    found = document_ids(stream, windows, context, 0)
    for window in windows:
        for j in range(context):
            assert found[window, j] == tokens[: window * context + 1 + j].count(0)
