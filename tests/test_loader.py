"""The order of examples is a pure function of seed and index: resumable, and the same for any process count."""

import numpy as np
import pytest

from lrjax.data.loader import Component, make_loader
from lrjax.errors import UserError

LENGTH = 6


def records(name, count):
    return [{"id": f"{name}{i}", "number": i} for i in range(count)]


def example(record, rng):
    """An example that shows its record (tokens) and its random draw (positions)."""
    return {
        "tokens": np.full(LENGTH, record["number"], np.int32),
        "positions": np.sort(rng.choice(1000, LENGTH, replace=False)).astype(np.int32),
        "segment_ids": np.ones(LENGTH, np.int32),
        "weights": np.ones(LENGTH, np.float32),
    }


def mixture():
    far = [{"id": f"far{i}", "number": 100 + i} for i in range(3)]
    return [Component(records("near", 7), example, 0.7), Component(far, example, 0.3)]


def take(steps, components=None, **arguments):
    """The first batches, joined to {name: [steps * b, L]}."""
    arguments = {"seed": 0, "global_batch_size": 4} | arguments
    loader = make_loader(components or mixture(), **arguments)
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], strict=True)


def test_same_seed_same_bytes():
    first = take(10)
    assert {name: array.dtype.name for name, array in first.items()} == {
        "tokens": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "weights": "float32",
    }
    assert_same(first, take(10))
    assert_same(first, take(10, num_threads=0))
    assert_same(first, take(10, num_threads=8, prefetch_batches=16))
    assert (first["tokens"] != take(10, seed=1)["tokens"]).any()


@pytest.mark.parametrize("components", [mixture(), mixture()[:1]])
def test_batches_of_one_example_are_the_same_examples(components):
    assert_same(take(8, components, global_batch_size=1), take(2, components, global_batch_size=4))


@pytest.mark.parametrize("start", [1, 4, 13, 28])
def test_resumed_is_uninterrupted(start):
    """Also in the middle of a batch, and of an epoch of 7 or 3 records."""
    whole = take(15)
    rest = take(8, start_example=start)
    assert_same({name: array[start : start + 32] for name, array in whole.items()}, rest)


@pytest.mark.parametrize("start", [0, 6, 8])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batches(count, start):
    alone = take(5, start_example=start)
    parts = [
        take(5, start_example=start, process_index=index, process_count=count)
        for index in range(count)
    ]
    for name, array in alone.items():
        of_example = {}  # global number of the example -> row
        for index, part in enumerate(parts):
            first = start + (index - start) % count
            of_example |= {first + count * row: values for row, values in enumerate(part[name])}
        np.testing.assert_array_equal([of_example[start + row] for row in range(20)], array)
        steps = [np.split(part[name], 5) for part in parts]
        for step, expected in enumerate(np.split(array, 5)):
            shared = np.concatenate([split[step] for split in steps])
            assert sorted(map(tuple, shared)) == sorted(map(tuple, expected))


def test_another_number_of_processes_goes_on():
    whole = take(6)
    rest = [take(3, start_example=12, process_index=index, process_count=2) for index in range(2)]
    joined = np.stack([part["positions"] for part in rest], axis=1).reshape(-1, LENGTH)
    np.testing.assert_array_equal(joined, whole["positions"][12:])


def test_an_epoch_is_every_record_once_in_an_order_of_its_own():
    numbers = take(6, [Component(records("near", 8), example)])["tokens"][:, 0].reshape(3, 8)
    np.testing.assert_array_equal(np.sort(numbers), np.tile(np.arange(8), (3, 1)))
    assert len({tuple(epoch) for epoch in numbers}) == 3


def test_draws_depend_on_seed_id_and_epoch_alone():
    def by_record(batches):
        tokens, positions = batches["tokens"][:, 0], batches["positions"]
        return {number: positions[tokens == number] for number in range(8)}

    eight = by_record(take(6, [Component(records("near", 8), example)]))
    assert all(len(np.unique(draws, axis=0)) == 3 for draws in eight.values())
    assert len(np.unique(np.concatenate(list(eight.values())), axis=0)) == 24
    # The same documents in another mixture and another place come out alike.
    turned = [Component(records("other", 4), example), Component(records("near", 8)[::-1], example)]
    loader = take(12, turned)
    of_near = {tuple(row) for row in loader["positions"]}
    assert {tuple(draws[0]) for draws in eight.values()} <= of_near


def test_shares_of_the_mixture():
    far = [{"id": f"far{i}", "number": 1000 + i} for i in range(900)]
    components = [Component(records("near", 900), example, 0.7), Component(far, example, 0.3)]
    is_far = take(250, components)["tokens"][:, 0] >= 1000
    assert abs(is_far.mean() - 0.3) < 0.005
    for part in np.split(is_far, 10):
        assert abs(part.mean() - 0.3) < 0.02


def broken(change):
    def transform(record, rng):
        made = example(record, rng)
        if record["number"] == 2:
            change(made)
        return made

    return [Component(records("near", 4), transform)]


def refuse(made):
    raise UserError("the training length 9 is over the target 8")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (refuse, "record 'near2' of component 0: the training length 9 is over the target 8"),
        (
            lambda made: made.pop("weights"),
            "record 'near2' of component 0: its example has no 'weights'",
        ),
        (
            lambda made: made.update(positions=np.arange(LENGTH, dtype=np.int64)),
            r"record 'near2' of component 0: positions is int64 \[6\]",
        ),
        (
            lambda made: made.update(weights=np.ones(5, np.float32)),
            r"record 'near2' of component 0: weights is float32 \[5\] beside tokens \[6\]",
        ),
        (
            lambda made: made.update({name: array[:5] for name, array in made.items()}),
            "near2.* of the same batch",
        ),
    ],
)
def test_a_bad_record_is_named(change, line):
    with pytest.raises(UserError, match=line) as error:
        take(1, broken(change))
    assert "\n" not in str(error.value)


def test_a_bug_in_a_transform_keeps_its_type_and_names_the_record():
    with pytest.raises(KeyError) as error:
        take(1, broken(lambda made: made["nothing"]))
    assert any("record 'near2' of component 0, epoch 0" in note for note in error.value.__notes__)


@pytest.mark.parametrize(
    ("components", "arguments", "line"),
    [
        ([], {}, "no component"),
        ([Component([], example)], {}, "component 0 of the mixture has no records"),
        ([Component(records("a", 1), example, 0.0)], {}, "has weight 0.0; allowed: above 0"),
        ([Component(records("a", 1), example, float("nan"))], {}, "has weight nan"),
        (
            [Component(records("a", 1), example)],
            {"global_batch_size": 5, "process_count": 2},
            "5: allowed",
        ),
        ([Component([{"number": 0}], example)], {}, "component 0: a record has the id None"),
    ],
)
def test_bad_mixtures_are_named(components, arguments, line):
    with pytest.raises(UserError, match=line):
        next(make_loader(components, **({"seed": 0, "global_batch_size": 4} | arguments)))
