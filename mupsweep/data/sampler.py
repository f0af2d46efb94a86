"""The blocks of the corpus that a step reads: a pure function of (number of blocks, batch size, seed, step).

Sample k of a run is block perm(seed, k // N)(k mod N): every epoch visits each of the N blocks once, in an order of its
own. perm is a keyed bijection that is computed and not stored, so every step costs the same, resuming needs only the
step number, and every width, depth and LR of a sweep reads the same tokens in the same order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
MASK64 = (1 << 64) - 1
# splitmix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators")
STEP, MUL_A, MUL_B = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
SHIFT_A, SHIFT_B, SHIFT_C = np.uint64(30), np.uint64(27), np.uint64(31)


def batch_blocks(n_blocks: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The blocks (batch_size,) of optimizer step `step`, each in [0, n_blocks); steps are counted from 0."""
    if n_blocks < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"n_blocks={n_blocks}, batch_size={batch_size}, step={step}: need at least 1, 1 and 0")
    samples = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
    size = np.uint64(n_blocks)
    return permute(samples % size, n_blocks, seed, samples // size)


def permute(positions: NDArray[np.uint64], n: int, seed: int, epochs: NDArray[np.uint64] | int) -> NDArray[np.int64]:
    """perm(seed, epoch)(position) for each position: a bijection of [0, n) for every seed and epoch.

    A Feistel network permutes [0, 2^b), the next power of two. A value outside [0, n) is permuted again until it is
    inside, which takes at most two permutations on average (cycle walking: Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains").
    """
    bits = (n - 1).bit_length()
    values = np.array(positions, dtype=np.uint64)
    keys = _mix(
        np.broadcast_to(np.asarray(epochs, dtype=np.uint64), values.shape)
        ^ _mix(np.array([seed & MASK64], dtype=np.uint64))
    )
    outside = np.arange(len(values))  # indices of the values to permute
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys[outside])
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed bijection of [0, 2^bits); each round XORs one half of the bits with a hash of the other half."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    low, high = values & low_mask, values >> low_bits
    for i in range(ROUNDS):
        key = _mix(keys + np.uint64(i))
        if i % 2:
            low = low ^ (_mix(high ^ key) & low_mask)
        else:
            high = high ^ (_mix(low ^ key) & high_mask)
    return high << low_bits | low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64, modulo 2^64; on arrays only, since numpy warns of overflow in scalars."""
    x = x + STEP
    x = (x ^ (x >> SHIFT_A)) * MUL_A
    x = (x ^ (x >> SHIFT_B)) * MUL_B
    return x ^ (x >> SHIFT_C)
