"""Kaplan's exponent to Chinchilla's: planted worlds in which one step does all, and steps that cannot be made."""

from dataclasses import replace

import numpy as np
import pytest

from homelab_scaling.fit.reconcile import on_the_way, reconcile
from homelab_scaling.runs import LossPoint

TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
HORIZONS = (1e8, 2e8, 4e8)
VOCAB = 32_000


def world(*, with_offset=True, head=True, noise=0.0003, seed=0):
    """Small GPT-2s whose loss follows body and head; the head is most of the smallest."""
    rng = np.random.default_rng(seed)
    points = []
    for width in (64, 96, 128, 192, 256, 384, 512):
        body, top = 12 * (width // 24 + 2) * width**2, VOCAB * width if head else 1
        for d in HORIZONS:
            loss = TRUTH["A"] * (body + top) ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
            loss = (loss + TRUTH["E"] * with_offset) * np.exp(noise * rng.normal())
            points.append(
                LossPoint(
                    n_params=body + top,
                    n_tokens=d,
                    loss_nats=loss,
                    row_id=f"{width}@{d:.0f}",
                    run_id=str(width),
                    decayed=True,
                    n_body=body,
                    n_head=top,
                )
            )
    return points


def test_the_last_step_finds_the_planted_exponent_and_counting_moves_it():
    found = reconcile(world(), n_bootstrap=200)
    names = [step.name for step in found.steps]
    assert names == ["body parameters only", "+ output head", "+ only finished decays", "+ irreducible term"]
    a = [step.a.value for step in found.steps]
    truth = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    assert a[3] == pytest.approx(truth, abs=0.03)
    low, high = found.steps[3].a.ci95
    assert low < truth < high
    assert a[0] > a[1] + 0.05  # the head flattens L(N_body): Porian's and Pearce and Song's first finding
    assert "these points give N_opt" in found.summary and f"C^{a[0]:.3g}" in found.summary


def test_without_a_head_or_an_offset_these_steps_change_nothing():
    found = reconcile(world(head=False, with_offset=False), n_bootstrap=0)
    a = [step.a.value for step in found.steps]
    assert a[0] == pytest.approx(a[1], abs=1e-3)
    assert a[3] == pytest.approx(a[2], abs=0.02)


def test_no_unfinished_loss_means_that_step_changes_nothing_and_says_so():
    found = reconcile(world(), n_bootstrap=0)
    assert found.steps[2].a == found.steps[1].a
    assert "every row has decayed already" in found.steps[2].why_not


def test_unfinished_losses_stand_in_for_rows_until_the_third_step():
    points = world()
    early = [
        replace(
            p, loss_nats=p.loss_nats * (1 + 0.08 * (4e8 / p.n_tokens - 1) / 3), decayed=False, row_id=f"{p.row_id}~"
        )
        for p in points
        if p.n_tokens < 4e8
    ]
    found = reconcile(points, early, n_bootstrap=0)
    assert [step.n_unfinished for step in found.steps] == [len(early), len(early), 0, 0]
    assert {step.n_points for step in found.steps} == {len(points)}
    assert found.steps[2].why_not is None
    assert abs(found.steps[2].a.value - found.steps[1].a.value) > 0.01
    mixed = reconcile([*points, *early], n_bootstrap=0)  # a table that holds both
    assert mixed.steps[0].n_points == found.steps[0].n_points


def test_a_step_that_cannot_be_made_says_why():
    bare = [replace(p, n_body=None) for p in world()]
    found = reconcile(bare, n_bootstrap=0)
    assert all("n_body is empty" in step.why_not for step in found.steps)
    assert found.summary.startswith("Kaplan and Chinchilla cannot be reconciled on these points")
    three = world()[::7][:3]
    found = reconcile(three, n_bootstrap=50)
    assert all(step.a.value is None and step.a.ci95 is None for step in found.steps)
    assert "3 points for 4 parameters" in found.steps[0].why_not


def test_losses_on_the_way_are_read_where_the_horizons_lie():
    rows = world(noise=0.0)[:3]
    tokens = np.geomspace(1e7, 3.2e8, 40)
    losses = 5 * tokens**-0.05
    found = on_the_way(rows, list(tokens), list(losses))
    assert [p.n_tokens for p in found] == [1e8, 2e8]  # the trunk never reaches the last horizon
    for p in found:
        assert p.loss_nats == pytest.approx(5 * p.n_tokens**-0.05, rel=1e-9)
        assert p.decayed is False and p.run_id == rows[0].run_id
    single = on_the_way(rows[-1:], list(tokens), list(losses))
    assert [p.n_tokens for p in single] == [1e8, 2e8]
    assert on_the_way([], list(tokens), list(losses)) == [] and on_the_way(rows, [1e8], [4.0]) == []
