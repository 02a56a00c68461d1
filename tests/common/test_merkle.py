"""Merkle trees against test vectors of Certificate Transparency, a second computation, and forged proofs."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.common import merkle
from persona_rlhf.common.merkle import MerkleTree, TreeHead, extends, includes

# The eight leaves and the roots that implementations of RFC 6962 test with
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


@pytest.mark.parametrize("size", ROOTS)
def test_the_roots_of_certificate_transparency(size):
    assert MerkleTree(LEAVES).head(size) == TreeHead(size, ROOTS[size])


def test_paths_and_proofs_of_the_example_of_the_rfc():
    """RFC 6962, section 2.1.3: a tree of seven leaves, with its nodes as they are named there."""
    a, b, c, d, e, f, j = (sha(b"\0", leaf) for leaf in LEAVES[:7])
    g, h, i = sha(b"\1", a, b), sha(b"\1", c, d), sha(b"\1", e, f)
    k, l = sha(b"\1", g, h), sha(b"\1", i, j)  # noqa: E741
    tree = MerkleTree(LEAVES[:7])
    assert tree.head().root == sha(b"\1", k, l).hex()
    assert tree.inclusion(0) == [node.hex() for node in (b, h, l)]
    assert tree.inclusion(3) == [node.hex() for node in (c, g, l)]
    assert tree.inclusion(4) == [node.hex() for node in (f, j, k)]
    assert tree.inclusion(6) == [node.hex() for node in (i, k)]
    assert tree.consistency(3) == [node.hex() for node in (c, d, g, l)]
    assert tree.consistency(4) == [l.hex()]
    assert tree.consistency(6) == [node.hex() for node in (i, j, k)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=6), min_size=1, max_size=40), st.data())
def test_a_true_proof_holds_and_a_forged_one_does_not(lines, data):
    tree = MerkleTree(lines)
    head = tree.head()
    index = data.draw(st.integers(0, len(lines) - 1))
    path = tree.inclusion(index)
    assert includes(head, index, lines[index], path)
    assert not includes(head, index, lines[index] + b"x", path)
    assert not includes(head, index, lines[index], [*path, "00" * 32])
    assert not includes(head, head.size, lines[index], path)
    assert not includes(TreeHead(head.size, "0" * 64), index, lines[index], path)
    for at in range(len(path)):
        assert not includes(head, index, lines[index], path[:at] + path[at + 1 :])
        assert not includes(head, index, lines[index], [*path[:at], "ab" * 32, *path[at + 1 :]])

    before = tree.head(data.draw(st.integers(1, len(lines))))
    proof = tree.consistency(before.size)
    assert extends(before, head, proof)
    assert not extends(TreeHead(before.size, "0" * 64), head, proof)
    assert not extends(before, head, [*proof, "00" * 32])
    for at in range(len(proof)):
        assert not extends(before, head, [*proof[:at], "ab" * 32, *proof[at + 1 :]])
        assert not extends(before, head, proof[:at] + proof[at + 1 :])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=4), min_size=2, max_size=30), st.data())
def test_a_rewritten_beginning_has_no_proof(lines, data):
    size = data.draw(st.integers(1, len(lines)))
    at = data.draw(st.integers(0, size - 1))
    other = MerkleTree([*lines[:at], lines[at] + b"!", *lines[at + 1 :]])
    assert not extends(MerkleTree(lines).head(size), other.head(), other.consistency(size))


def test_an_empty_tree_begins_none():
    tree = MerkleTree(LEAVES)
    assert not extends(tree.head(0), tree.head(), [])
    assert not extends(tree.head(), tree.head(3), [])


@pytest.mark.parametrize("text", ["", "3", "3:", "3:xyz", "x:" + "0" * 64, "3:" + "A" * 64])
def test_a_text_that_is_no_head_is_refused(text):
    with pytest.raises(ValueError, match="SIZE:SHA256"):
        TreeHead.parse(text)
    head = MerkleTree(LEAVES).head()
    assert TreeHead.parse(f" {head}\n") == head


def test_the_paths_of_all_lines_cost_one_walk_over_the_leaves(monkeypatch):
    """3,001 lines have 3,000 nodes. Each path needs at most 12 more of subtrees that are not full."""
    tree, nodes = MerkleTree([b"%d" % n for n in range(3001)]), 0

    def counted(left: bytes, right: bytes) -> bytes:
        nonlocal nodes
        nodes += 1
        return sha(b"\1", left, right)

    monkeypatch.setattr(merkle, "_node", counted)
    for index in range(3001):
        tree.inclusion(index)
    assert nodes < 3000 + 12 * 3001
