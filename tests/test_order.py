import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from llmtrain.data.order import Order, rank_samples, update_samples


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 1000, 65537])
def test_every_epoch_visits_every_sample_once(num_samples: int) -> None:
    """Else some of the text is trained on twice and some never."""
    order = Order(num_samples, seed=7, data_hash="abc")
    for epoch in (0, 1, 5):
        ids = order.samples(epoch * num_samples, num_samples)
        assert np.array_equal(np.sort(ids), np.arange(num_samples))


def test_epochs_seeds_and_data_have_orders_of_their_own() -> None:
    """Else the second epoch repeats the first, or a seed changes nothing."""
    first = Order(1000, 7, "abc").samples(0, 1000)
    others = [
        Order(1000, 7, "abc").samples(1000, 1000),
        Order(1000, 8, "abc").samples(0, 1000),
        Order(1000, 7, "abd").samples(0, 1000),
    ]
    for other in others:
        assert (first == other).mean() < 0.02
    assert (first == np.arange(1000)).mean() < 0.02


def test_order_is_as_it_always_was() -> None:
    """Else a run begun with an earlier version resumes on other samples: these numbers never change."""
    assert Order(10, 0, "golden").samples(0, 25).tolist() == [
        *[1, 2, 4, 8, 6, 5, 9, 7, 3, 0],
        *[9, 3, 1, 8, 5, 0, 4, 7, 6, 2],
        *[6, 8, 0, 1, 7],
    ]
    assert Order(2**40, 1, "abc").samples(10**12, 4).tolist() == [
        287963798112,
        392129995638,
        135058966155,
        512321081565,
    ]


def test_order_equals_a_slow_obvious_reference() -> None:
    """Else the vectorised network is not the documented permutation."""
    for num_samples, epoch in product((3, 10, 100, 5000), (0, 2)):
        order = Order(num_samples, 3, "reference")
        positions = range(0, num_samples, max(1, num_samples // 50))
        for offset in positions:
            found = order.samples(epoch * num_samples + offset, 1)[0]
            assert found == _slow_permute(order, epoch, offset)


def _slow_permute(order: Order, epoch: int, value: int) -> int:
    half, words = 1, 2**64
    while 4**half < order.num_samples:
        half += 1
    keys = [int(key) for key in order._keys(epoch)]
    while True:
        left, right = value >> half, value % 2**half
        for key in keys:
            x = (right + key) % words
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % words
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % words
            left, right = right, left ^ ((x ^ (x >> 31)) % 2**half)
        value = left << half | right
        if value < order.num_samples:
            return value


def test_a_batch_may_span_epochs() -> None:
    """Else a run loses or repeats samples where an epoch ends inside a global batch."""
    order = Order(7, 1, "abc")
    whole = order.samples(0, 70)
    pieces = [order.samples(start, 10) for start in range(0, 70, 10)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert order.samples(5, 0).size == 0


def test_a_far_position_needs_none_before_it() -> None:
    """Else a resume deep into a run reads its way there for hours."""
    ids = Order(10**9 + 7, 1, "abc").samples(10**12, 4096)
    assert len(np.unique(ids)) == 4096
    assert ids.min() >= 0 and ids.max() < 10**9 + 7


def test_neighbouring_positions_are_shuffled_far_apart() -> None:
    """Else a batch is made of neighbouring text, and its loss says little about the corpus."""
    ids = Order(2**20, 1, "abc").samples(0, 20_000)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    assert abs(ids.mean() / 2**20 - 0.5) < 0.01


def test_order_does_not_depend_on_the_interpreter_run() -> None:
    """Else two ranks, or a resumed process, disagree about what update k trains on."""
    code = "from llmtrain.data.order import Order; print(Order(1000, 3, 'x').samples(990, 30).tolist())"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert found == {f"{Order(1000, 3, 'x').samples(990, 30).tolist()}\n"}


def test_the_global_batch_does_not_depend_on_how_it_is_split() -> None:
    """Else the same run on another number of GPUs sees other data."""
    order = Order(1003, 5, "abc")
    for world_size, accumulation, micro in [(1, 1, 8), (1, 8, 1), (2, 2, 2), (4, 1, 2), (2, 4, 1), (8, 1, 1)]:
        for update in (1, 2, 130):
            ids = update_samples(order, update, 8)
            assert np.array_equal(ids, order.samples((update - 1) * 8, 8))
            shares = np.stack([rank_samples(ids, world_size, rank, micro) for rank in range(world_size)], axis=1)
            assert shares.shape == (accumulation, world_size, micro)
            assert np.array_equal(shares.reshape(-1), ids)


def test_order_needs_no_torch() -> None:
    """Else a preview on a login node takes seconds to start."""
    code = "import sys, llmtrain.data.order, llmtrain.data.dataset; print({'torch', 'datasets'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
