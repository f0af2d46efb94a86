"""The sampler: bijections, independence of everything but its arguments, golden numbers."""

from __future__ import annotations

import numpy as np
import pytest

from mupsweep.data.sampler import batch_blocks, permute


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n, dtype=np.uint64), n, seed, epoch)


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 1025, 65_537, 250_001])
def test_perm_is_a_bijection(n: int) -> None:
    assert (np.sort(order(n, seed=n, epoch=3)) == np.arange(n)).all()


def test_golden_batches() -> None:
    assert batch_blocks(1000, 8, seed=0, step=0).tolist() == [404, 729, 623, 343, 661, 703, 586, 465]
    assert batch_blocks(29_184, 4, seed=1234, step=100_000).tolist() == [14211, 6189, 27311, 6041]
    assert batch_blocks(3, 8, seed=7, step=1).tolist() == [2, 2, 1, 0, 0, 2, 1, 1]
    assert batch_blocks(1000, 8, seed=0, step=0).dtype == np.int64


def test_each_epoch_visits_every_block_once() -> None:
    n, batch = 37, 5
    samples = np.concatenate([batch_blocks(n, batch, seed=1, step=s) for s in range(37)])
    for epoch in samples.reshape(5, 37):
        assert sorted(epoch) == list(range(37))


def test_the_batch_size_only_regroups_the_samples() -> None:
    small = np.concatenate([batch_blocks(100, 4, 9, s) for s in range(60)])
    large = np.concatenate([batch_blocks(100, 24, 9, s) for s in range(10)])
    assert (small == large).all()


def test_epochs_and_seeds_differ() -> None:
    orders = [order(5000, seed, epoch) for seed in (0, 1, 2, -1) for epoch in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # one fixed point is expected between two random permutations


def test_the_order_looks_random() -> None:
    n, trials = 1000, 400
    orders = np.stack([order(n, seed) for seed in range(trials)])
    # Mean position of each block over the seeds: n/2 with standard deviation n / sqrt(12 * trials) = 14.4.
    means = np.argsort(orders, axis=1).mean(axis=0)
    assert abs(means.mean() - (n - 1) / 2) < 1e-9
    assert 13 < means.std() < 16
    assert np.abs(means - (n - 1) / 2).max() < 5 * 14.4
    neighbours = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.01


def test_small_permutations_all_occur() -> None:
    orders = [tuple(order(4, seed)) for seed in range(2400)]
    counts = [orders.count(p) for p in set(orders)]
    assert len(counts) == 24
    assert min(counts) > 50
    assert max(counts) < 170  # 100 each


@pytest.mark.parametrize("bad", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)])
def test_impossible_arguments_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="need at least 1, 1 and 0"):
        batch_blocks(*bad)
