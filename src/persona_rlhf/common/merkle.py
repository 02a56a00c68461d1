"""Merkle trees over lines: a root, proofs that a line is in a tree, and proofs that a tree only grew.

Hashes as in RFC 6962, section 2.1; checks as in RFC 9162, sections 2.1.3.2 and 2.1.4.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class TreeHead(NamedTuple):
    """The number of lines of a tree, and its root."""

    size: int
    root: str

    def __str__(self) -> str:
        return f"{self.size}:{self.root}"

    @staticmethod
    def parse(text: str) -> TreeHead:
        """A head as `str` writes it. Raises ValueError for anything else."""
        size, _, root = text.strip().partition(":")
        if not size.isdecimal() or len(root) != 64 or set(root) - set("0123456789abcdef"):
            raise ValueError(f"a Merkle root reads SIZE:SHA256, got `{text.strip()[:80]}`")
        return TreeHead(int(size), root)


class MerkleTree:
    """The tree over lines (bytes): the hashes of its leaves, and of every full subtree once it was asked for.

    So the paths of many lines cost one walk over the leaves, and then the logarithm of the size each.
    """

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._leaves = [leaf_hash(line) for line in lines]
        self._full: dict[tuple[int, int], bytes] = {}

    def head(self, size: int | None = None) -> TreeHead:
        """The head of the first `size` lines, or of all."""
        size = len(self._leaves) if size is None else size
        return TreeHead(size, self._root(0, size).hex())

    def inclusion(self, index: int) -> list[str]:
        """The path of the line with this index (from 0), from the leaf up (`PATH` of RFC 6962)."""
        return [node.hex() for node in self._path(index, 0, len(self._leaves))]

    def consistency(self, size: int) -> list[str]:
        """The proof that the first `size` lines begin this tree (`PROOF` of RFC 6962); 0 < size."""
        return [node.hex() for node in self._subproof(size, 0, len(self._leaves), True)]

    def _root(self, start: int, size: int) -> bytes:
        """The root over `size` leaves from `start` on."""
        if size < 2:
            return self._leaves[start] if size else hashlib.sha256().digest()
        if (start, size) in self._full:
            return self._full[start, size]
        split = _split(size)
        root = _node(self._root(start, split), self._root(start + split, size - split))
        if size == 2 * split:
            self._full[start, size] = root
        return root

    def _path(self, index: int, start: int, size: int) -> list[bytes]:
        """The path of a leaf, by its index in the subtree of `size` leaves from `start` on."""
        if size == 1:
            return []
        split = _split(size)
        if index < split:
            return [*self._path(index, start, split), self._root(start + split, size - split)]
        return [*self._path(index - split, start + split, size - split), self._root(start, split)]

    def _subproof(self, before: int, start: int, size: int, whole: bool) -> list[bytes]:
        """The nodes that show the first `before` leaves of this subtree; `whole` where they are the whole old tree."""
        if before == size:
            return [] if whole else [self._root(start, size)]
        split = _split(size)
        if before <= split:
            return [*self._subproof(before, start, split, whole), self._root(start + split, size - split)]
        return [*self._subproof(before - split, start + split, size - split, False), self._root(start, split)]


def leaf_hash(line: bytes) -> bytes:
    """The hash of a line as a leaf."""
    return hashlib.sha256(b"\0" + line).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << (size - 1).bit_length() - 1


def includes(head: TreeHead, index: int, line: bytes, path: Sequence[str]) -> bool:
    """Whether a line has this index (from 0) in the tree of a head, by its path. Raises ValueError for no hex."""
    if not 0 <= index < head.size:
        return False
    place, last, node = index, head.size - 1, leaf_hash(line)
    for sibling in map(bytes.fromhex, path):
        if last == 0:
            return False
        if place & 1 or place == last:
            node = _node(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = _node(node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and node.hex() == head.root


def extends(before: TreeHead, after: TreeHead, proof: Sequence[str]) -> bool:
    """Whether the tree of `after` begins with that of `before`, by a proof. Raises ValueError for no hex."""
    if not 0 < before.size <= after.size:
        return False
    if before.size == after.size:
        return not proof and before == after
    nodes = [bytes.fromhex(node) for node in proof]
    if before.size & (before.size - 1) == 0:
        nodes.insert(0, bytes.fromhex(before.root))
    if not nodes:
        return False
    place, last = before.size - 1, after.size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old, new = _node(node, old), _node(node, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = _node(new, node)
        place, last = place >> 1, last >> 1
    return last == 0 and old.hex() == before.root and new.hex() == after.root
