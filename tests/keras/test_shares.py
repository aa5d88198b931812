"""How the rows of ranks are dealt to global batches."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from dask_keras.shares import Shares

LAYOUTS = st.builds(
    Shares,
    st.lists(st.sampled_from([0, 1, 7, 300]) | st.integers(0, 2000), min_size=1, max_size=6).filter(any).map(tuple),
    st.sampled_from([1, 2, 8, 33, 256, 10_000]),
)


@settings(deadline=None)
@given(LAYOUTS)
def test_every_row_comes_once_a_pass_in_proportion_to_the_rows_of_its_rank(shares: Shares) -> None:
    over = [0] * len(shares.rows)
    for step in range(shares.steps):
        assert shares.before(step + shares.steps) == (1, tuple(over))
        found = shares.of_step(step)
        assert found == shares.of_step(step + shares.steps)
        assert sum(found) == min(shares.batch_size, shares.total - step * shares.batch_size)
        for rank, count in enumerate(found):
            assert abs(count - sum(found) * shares.rows[rank] / shares.total) < 2
            over[rank] += count
    assert tuple(over) == shares.rows


@given(LAYOUTS, st.data())
def test_steps_of_a_rank_that_follow_one_another_have_the_number_of_rows_foretold(
    shares: Shares, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, len(shares.rows) - 1))
    step = data.draw(st.integers(0, 2 * shares.steps))
    count, steps = shares.of_rank(rank, step)
    assert 1 <= steps <= shares.steps - step % shares.steps
    assert [shares.of_step(step + after)[rank] for after in range(steps)] == [count] * steps


def test_the_number_of_rows_of_a_rank_seldom_changes() -> None:
    shares = Shares((100_000, 150_001, 77_777), 256)
    for rank in range(3):
        runs = list(itertools.groupby(shares.of_step(step)[rank] for step in range(shares.steps)))
        assert len(runs) <= 3 * (shares.steps / 128 + 2)
