"""Buffers: maps that live at the same time never share memory, and the arena is no larger than it must be."""

from hypothesis import given
from hypothesis import strategies as st

from cconv.planning.buffers import ALIGNMENT, Lifetime, place


@st.composite
def lifetimes(draw):
    lives = {}
    for value in range(draw(st.integers(0, 25))):
        first = draw(st.integers(0, 20))
        lives[value] = Lifetime(draw(st.integers(1, 10_000)), first, first + draw(st.integers(0, 10)))
    return lives


@given(lifetimes())
def test_values_that_live_together_never_overlap(lives):
    offsets, size = place(lives)
    assert offsets.keys() == lives.keys()
    placed = [(offsets[v], offsets[v] + life.size, life) for v, life in lives.items()]
    for i, (begin, end, life) in enumerate(placed):
        assert begin % ALIGNMENT == 0
        assert begin >= 0
        assert end <= size
        for other_begin, other_end, other in placed[:i]:
            if life.first <= other.last and other.first <= life.last:
                assert end <= other_begin or other_end <= begin


@given(lifetimes())
def test_the_arena_lies_between_the_fullest_step_and_the_sum(lives):
    _, size = place(lives)
    rounded = {v: -(-life.size // ALIGNMENT) * ALIGNMENT for v, life in lives.items()}
    steps = {life.first for life in lives.values()}
    fullest = max(
        (sum(rounded[v] for v, life in lives.items() if life.first <= s <= life.last) for s in steps), default=0
    )
    assert fullest <= size <= sum(rounded.values())


@given(lifetimes())
def test_the_same_lifetimes_give_the_same_places(lives):
    assert place(lives) == place(dict(reversed(lives.items())))


def test_a_chain_of_maps_needs_two_places():
    """Each layer reads the one before: the third map takes the first one's place."""
    arena = place({v: Lifetime(1000, v, v + 1) for v in range(10)})
    assert arena.size == 2 * 1024
