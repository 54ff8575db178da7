"""Plan: a frozen value that says everything a program needs, made once per question."""

import dataclasses

import pytest

from cconv.planning import Machine, Operation, plan, specs, tensors
from cconv.planning.tensors import Axis

MACHINE = Machine(
    "test", vector_bytes=64, tile_rows=14, tile_vectors=2, pixel_vectors=(8, 4, 2, 2), threads=2, l2_bytes=1 << 20
)


def _chain(layers: int, size: int = 8):
    """conv -> conv -> ... on 4 channels, value 0 in."""
    spec = specs.conv((4, size, size), (4, 4, 3, 3), padding=1)
    return tuple(Operation(spec, (i,), i + 1, f"layer{i}") for i in range(layers))


def test_one_operator_is_a_plan_of_one_step():
    made = plan.single(specs.conv((3, 8, 8), (4, 3, 3, 3)), MACHINE)
    assert (made.inputs, made.outputs, len(made.steps)) == ((0,), (1,), 1)
    assert made.values == {0: (3, 8, 8), 1: (4, 6, 6)}
    assert made.arena.size == 0


def test_a_residual_is_a_second_input_of_the_outputs_shape():
    made = plan.single(specs.conv((3, 8, 8), (4, 3, 3, 3), residual=True), MACHINE)
    assert made.inputs == (0, 1)
    assert made.values[1] == made.values[2] == (4, 6, 6)
    assert plan.single(specs.pointwise((3, 8, 8), add=True), MACHINE).inputs == (0, 1)


def test_the_same_question_gives_the_same_plan():
    spec = specs.conv((3, 8, 8), (4, 3, 3, 3))
    assert plan.single(spec, MACHINE) is plan.single(spec, MACHINE)
    assert plan.make(_chain(3), {0: (4, 8, 8)}, (3,), MACHINE) == plan.make(_chain(3), {0: (4, 8, 8)}, (3,), MACHINE)


def test_only_what_is_neither_given_nor_asked_for_lives_in_the_arena():
    made = plan.make(_chain(6), {0: (4, 8, 8)}, (3, 6), MACHINE)
    assert made.arena.offsets.keys() == {1, 2, 4, 5}
    assert made.arena.size == 2 * 4 * 8 * 8


def test_a_value_that_is_read_again_keeps_its_place():
    """A skip connection: value 1 is read by the last step, so nothing may be written over it."""
    operations = (*_chain(3), Operation(specs.pointwise((4, 8, 8), add=True), (3, 1), 4))
    made = plan.make(operations, {0: (4, 8, 8)}, (4,), MACHINE)
    assert len(set(made.arena.offsets.values())) == 3


def _sum(last: int = 4):
    """Two maps; a convolution of the second added to the first; then one of value `last`."""
    conv, added = (specs.conv((4, 8, 8), (4, 4, 3, 3), padding=1, residual=r) for r in (False, True))
    return (
        Operation(conv, (0,), 1, "a"), Operation(conv, (1,), 2, "b"), Operation(added, (2, 1), 3, "c"),
        Operation(conv, (3,), 4, "d"), Operation(conv, (last,), 5, "e"),
    )  # fmt: skip


def test_a_sum_takes_the_place_of_a_residual_that_nobody_reads_again():
    image = {0: (4, 8, 8)}
    for made in (plan.make(_sum(), image, (5,), MACHINE).arena, plan.make(_sum(), image, (5,), MACHINE).alone):
        assert made.offsets[1] == made.offsets[3]
        assert made.size == 2 * 256
    again = plan.make(_sum(last=1), image, (5,), MACHINE).arena.offsets
    assert again[1] not in (again[2], again[3], again[4])
    assert plan.make(_sum(), image, (1, 5), MACHINE).arena.offsets.keys() == {2, 3, 4}
    assert plan.make(_sum(), image, (3, 5), MACHINE).arena.offsets.keys() == {1, 2, 4}


def test_a_sum_keeps_away_from_the_image_that_is_convolved_and_from_joined_values():
    """The residual may be the image itself; and a part of a whole is read there."""
    conv, added = (specs.conv((4, 8, 8), (4, 4, 3, 3), padding=1, residual=r) for r in (False, True))
    own = (Operation(conv, (0,), 1, "a"), Operation(added, (1, 1), 2, "b"), Operation(conv, (2,), 3, "c"))
    made = plan.make(own, {0: (4, 8, 8)}, (3,), MACHINE)
    assert made.arena.offsets[1] != made.arena.offsets[2]
    joins = [tensors.move((256,), (512,), [Axis(256, 1, 1)], at=at) for at in (0, 256)]
    parts = (
        Operation(conv, (0,), 1, "a"), Operation(conv, (0,), 2, "b"), Operation(joins[0], (1,), 3),
        Operation(joins[1], (2,), 3), Operation(added, (2, 1), 4, "c"),
        Operation(specs.conv((8, 8, 8), (4, 8, 1, 1), residual=True), (3, 4), 5, "d"), Operation(conv, (5,), 6, "e"),
    )  # fmt: skip
    made = plan.make(parts, {0: (4, 8, 8)}, (6,), MACHINE)
    assert made.moot == {2, 3}
    assert len({made.alone.offsets[value] for value in (1, 2, 4)}) == 3
    assert made.alone.offsets[4] == made.alone.offsets[5] >= 512


def _joined(times: int = 1):
    """Two maps joined; a third, made of the first, joined to both; a convolution of all."""
    conv, last = (specs.conv((c, 8, 8), (4, c, 3, 3), padding=1) for c in (4, 12))
    joins = [tensors.move((256,), (n,), [Axis(256, 1, 1)], at=at) for n, at in ((512, 0), (512, 256), (768, 512))]
    both = tensors.move((512,), (768,), [Axis(512, 1, 1)])
    return (
        Operation(conv, (0,), 1, "a"), Operation(conv, (0,), 2, "b"), Operation(joins[0], (1,), 3),
        Operation(joins[1], (2,), 3), Operation(conv, (1,), 4, "c", times), Operation(both, (3,), 5),
        Operation(joins[2], (4,), 5), Operation(last, (5,), 6, "d"),
    )  # fmt: skip


def test_parts_of_a_joined_value_are_written_in_their_places():
    made = plan.make(_joined(), {0: (4, 8, 8)}, (6,), MACHINE)
    assert made.moot == {2, 3, 5, 6}
    assert made.alone.offsets == {1: 0, 2: 256, 3: 0, 4: 512, 5: 0}
    assert made.alone.size == 768
    assert set(made.arena.offsets) == {1, 2, 3, 4, 5}
    assert made.arena.size > 768


def test_a_part_that_is_kept_or_repeated_is_moved():
    assert plan.make(_joined(), {0: (4, 8, 8)}, (1, 6), MACHINE).moot == {3, 5, 6}
    assert plan.make(_joined(), {0: (4, 8, 8)}, (3, 6), MACHINE).moot == {6}
    assert plan.make(_joined(times=2), {0: (4, 8, 8)}, (6,), MACHINE).moot == {2, 3, 5}


def test_executed_flops_add_over_the_steps():
    one = plan.single(specs.conv((4, 8, 8), (4, 4, 3, 3), padding=1), MACHINE).executed_flops
    assert plan.make(_chain(5), {0: (4, 8, 8)}, (5,), MACHINE).executed_flops == 5 * one
    assert plan.single(specs.pool("max", (4, 8, 8), 2), MACHINE).executed_flops == 0


def test_a_plan_is_frozen_and_holds_no_array():
    made = plan.make(_chain(2), {0: (4, 8, 8)}, (2,), MACHINE)
    for value in (made, made.steps[0], made.steps[0].operation, made.steps[0].tiling):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)
    assert "array" not in repr(made)
