"""Pairs of perceptual hashes that differ in few bits: all of them, or nearly all among many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tl.data.looks import BITS, FREQUENCIES

Hashes = NDArray[np.uint8]  # (N, 32)
Rows = NDArray[np.int64]

EXACT = 3_000  # hashes up to which every pair is compared, in about a second
TURNED = 30_000  # up to which images are compared with mirrored and turned ones too
BLOCK = 1024
LISTS, NEIGHBOURS = 24, 8
PLAIN = ""
TURNS = (PLAIN, "mirrored", "turned by 90°", "turned by 180°", "turned by 270°")


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, each once.

    Args:
        first: (P,) row.
        second: (P,) row, larger than the first.
        bits: (P,) in how many of 256 bits they differ.
        turn: (P,) index into `TURNS`: how the one lies to the other.
        complete: Whether every pair was compared.
    """

    first: Rows
    second: Rows
    bits: Rows
    turn: Rows
    complete: bool

    def __len__(self) -> int:
        return len(self.first)

    def where(self, kept: NDArray[np.bool_]) -> Pairs:
        """Some of them."""
        first, second, bits, turn = self.first, self.second, self.bits, self.turn
        return Pairs(first[kept], second[kept], bits[kept], turn[kept], self.complete)


def near_pairs(hashes: Hashes, limit: int, *, exact: int = EXACT) -> Pairs:
    """Pairs that differ in at most `limit` bits.

    Up to `exact` hashes every pair is compared. Beyond that each hash is compared with its
    neighbours in sorted lists, each with the bits in another order (Manku et al. 2007, "Detecting
    near-duplicates for web crawling"). Hardly a pair of 20 bits is missed; of those
    of 40 bits one in a hundred among 10,000 images, one in fifteen among 100,000.

    Args:
        hashes: (N, 32) bytes.
        limit: Bits of 256.
        exact: Hashes up to which every pair is compared.
    """
    complete = len(hashes) <= exact
    parts = list((_all_pairs if complete else _listed_pairs)(hashes, limit))
    found = np.concatenate([np.empty((0, 4), np.int64), *parts])
    # A pair may be near in several ways: the nearest counts.
    found = found[np.lexsort((found[:, 3], found[:, 2], found[:, 1], found[:, 0]))]
    _, once = np.unique(found[:, :2], axis=0, return_index=True)
    first, second, bits, turn = found[once].T
    return Pairs(first, second, bits, turn, complete)


def _all_pairs(hashes: Hashes, limit: int) -> Iterator[Rows]:
    """Rows (first, second, bits, turn); a product of matrices counts bits."""
    signs = np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1
    for number, turned in enumerate(_turned(signs)):
        for start in range(0, len(signs), BLOCK):
            alike = signs[start : start + BLOCK] @ turned[start:].T
            first, second = np.nonzero(alike >= BITS - 2 * limit)
            bits = (BITS - alike[first, second].astype(np.int64)) // 2
            kept = first < second
            turn = np.full(int(kept.sum()), number)
            yield np.stack([first[kept] + start, second[kept] + start, bits[kept], turn], axis=1)


def _turned(signs: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The signs of each image as it is and in each of `TURNS`.

    To mirror an image changes the sign of its odd frequencies in that direction.
    """
    yield signs
    square = signs.reshape(-1, FREQUENCIES, FREQUENCIES)
    odd = np.where(np.arange(1, FREQUENCIES + 1) % 2, -1, 1).astype(np.float32)
    across, down = odd[None, None, :], odd[None, :, None]
    turned = square.transpose(0, 2, 1)
    for variant in (square * across, turned * down, square * across * down, turned * across):
        yield variant.reshape(signs.shape)


def _listed_pairs(hashes: Hashes, limit: int) -> Iterator[Rows]:
    bits = np.unpackbits(hashes, axis=1)
    variants = [hashes]
    if len(hashes) <= TURNED:
        signs = bits.astype(np.float32) * 2 - 1
        variants += [np.packbits(turned > 0, axis=1) for turned in _turned(signs)][1:]
    for number, variant in enumerate(variants):
        # Turned images stand in the same lists as those that are not.
        both = np.concatenate([hashes, variant]) if number else hashes
        for pairs in _neighbours(both, limit):
            rows = np.sort(pairs[:, :2] % len(hashes), axis=1)
            kept = (rows[:, 0] < rows[:, 1]) & (
                (pairs[:, 0] < len(hashes)) != (pairs[:, 1] < len(hashes)) if number else True
            )
            turn = np.full(len(pairs), number)
            yield np.column_stack([rows, pairs[:, 2], turn])[kept]


def _neighbours(hashes: Hashes, limit: int) -> Iterator[Rows]:
    """Pairs (first, second, bits) that stand near each other in one of the lists."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    bits = np.unpackbits(hashes, axis=1)
    rng = np.random.default_rng(0)
    for _ in range(LISTS):
        # 64 of the bits order a list; more would not change who the neighbours are.
        chosen = np.ascontiguousarray(np.packbits(bits[:, rng.permutation(BITS)[:64]], axis=1))
        order = np.argsort(chosen.view(">u8")[:, 0], kind="stable")
        columns = np.ascontiguousarray(words[order].T)
        for step in range(1, NEIGHBOURS + 1):
            apart = np.zeros(len(order) - step, np.uint16)
            for column in columns:
                apart += np.bitwise_count(column[:-step] ^ column[step:])
            near = np.flatnonzero(apart <= limit)
            yield np.column_stack([order[near], order[near + step], apart[near]]).astype(np.int64)


def groups_of(pairs: Pairs, size: int) -> Rows:
    """Group of each of `size` rows, with chains joined; a row without a pair has a group alone."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs)), (pairs.first, pairs.second)), shape=(size, size))
    found: Rows = connected_components(links, directed=False)[1].astype(np.int64)
    return found
