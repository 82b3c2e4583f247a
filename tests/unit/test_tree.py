"""Token trees: order, masks, parsing, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_presets import PUBLISHED_PATHS


@st.composite
def trees(draw, max_nodes: int = 80) -> list[tuple[int, ...]]:
    """Paths of a random tree, each after its parent; ranks may have gaps."""
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, max_nodes))):
        # No deeper than trees of two mask words may be.
        parent = draw(st.sampled_from([(), *(p for p in paths[-8:] if len(p) < 62)]))
        child = (*parent, draw(st.integers(0, 12)))
        if child not in paths:
            paths.append(child)
    return paths


class TestShape:
    def test_chain_star_and_single(self):
        chain = TokenTree.from_paths([[0] * depth for depth in range(1, 6)])
        assert chain.parents == (-1, 0, 1, 2, 3, 4)
        assert chain.ancestor_masks == (1, 3, 7, 15, 31, 63)
        star = TokenTree.from_paths([[rank] for rank in range(4)])
        assert star.parents == (-1, 0, 0, 0, 0) and star.ranks == (0, 0, 1, 2, 3)
        assert star.ancestor_masks == (1, 3, 5, 9, 17)
        single = TokenTree.from_paths([[0]])
        assert (single.num_nodes, single.num_rows) == (1, 2)
        assert (single.max_depth, single.max_rank) == (1, 0)

    def test_row_63_uses_the_sign_bit(self):
        tree = TokenTree.from_paths([[rank] for rank in range(63)])
        assert tree.ancestor_masks[63] == 1 << 63 | 1
        words = tree.mask_words()
        assert words.dtype == np.int64 and words.shape == (64,)
        assert words[63] == -(2**63) + 1
        assert words.view(np.uint64).tolist() == list(tree.ancestor_masks)

    def test_row_64_starts_a_second_word(self):
        paths = [[0], *([0, rank] for rank in range(126))]
        words = TokenTree.from_paths(paths).mask_words()
        assert words.dtype == np.int64 and words.shape == (2, 128)
        assert words[:, 63].tolist() == [3 - 2**63, 0]
        assert words[:, 64].tolist() == [3, 1]
        assert words[:, 127].tolist() == [3, -(2**63)]
        assert TokenTree.from_paths(paths[:64]).mask_words().shape == (2, 65)

    @given(trees())
    def test_masks_agree_with_a_walk_to_the_root(self, paths):
        tree = TokenTree.from_paths(paths)
        for row in range(tree.num_rows):
            expected, current = 0, row
            while current != -1:
                expected |= 1 << current
                current = tree.parents[current]
            assert tree.ancestor_masks[row] == expected
            assert tree.ancestor_masks[row].bit_count() == tree.depths[row] + 1

    @given(trees())
    def test_parents_depths_ranks_agree_with_paths(self, paths):
        tree = TokenTree.from_paths(paths)
        rows = [(), *tree.paths]
        for row, path in enumerate(rows[1:], start=1):
            assert tree.parents[row] < row
            assert rows[tree.parents[row]] == path[:-1]
            assert (tree.depths[row], tree.ranks[row]) == (len(path), path[-1])
        assert sum(tree.nodes_per_depth) == tree.num_nodes
        assert tree.max_depth == max(tree.depths) and tree.max_rank == max(tree.ranks)

    @given(trees(), st.randoms(use_true_random=False))
    def test_order_is_kept_or_sorted(self, paths, random):
        assert TokenTree.from_paths(paths).paths == tuple(paths)
        shuffled = paths[:]
        random.shuffle(shuffled)
        tree = TokenTree.from_paths(shuffled)
        seen = [()]
        in_order = all(path[:-1] in seen and not seen.append(path) for path in shuffled)
        by_depth = tuple(sorted(paths, key=lambda path: (len(path), path)))
        assert tree.paths == (tuple(shuffled) if in_order else by_depth)

    @given(trees(), st.data())
    def test_cut_is_a_prefix_tree(self, paths, data):
        tree = TokenTree.from_paths(paths)
        num_nodes = data.draw(st.integers(1, tree.num_nodes))
        cut = tree.cut(num_nodes)
        assert cut.paths == tree.paths[:num_nodes]
        assert cut.ancestor_masks == tree.ancestor_masks[: num_nodes + 1]

    def test_widths(self):
        tree = TokenTree.from_widths([4, 2, 1])
        assert tree.nodes_per_depth == (4, 8, 8)
        assert tree.paths[:5] == ((0,), (1,), (2,), (3,), (0, 0))
        assert tree.paths[-1] == (3, 1, 0)

    def test_cut_forgets_the_expectation_of_the_whole(self):
        metadata = {"source": "x", "expected_tokens_per_step": 2.5}
        tree = TokenTree.from_paths([[0], [1]], metadata)
        assert tree.cut(2).metadata == metadata
        assert tree.cut(1).metadata == {"source": "x"}

    def test_importing_needs_no_torch(self):
        code = "import sys, vllm_medusa.tree; print('torch' in sys.modules)"
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == "False"


class TestRefusals:
    @pytest.mark.parametrize(
        ("paths", "words"),
        [
            ([], r"at least one node"),
            ([[]], r"empty path"),
            ([[0], [1, 0, 2]], r"\[1, 0, 2\] has no parent \[1, 0\].*add \[1, 0\]"),
            ([[0], [0, -1]], r"\[0, -1\].*negative rank -1"),
            ([[0], [1], [0]], r"\[0\] occurs twice"),
            ([[0], [0.5]], r"\[0.5\].*expected an integer"),
            ([[0], [True]], r"\[True\].*expected an integer"),
            ([[0], 3], r"found 3 where a path"),
            ([[0], "01"], r"found '01' where a path"),
            ([[rank] for rank in range(128)], r"found 128 nodes, expected at most 127.*\[127\]"),
            ([[0] * depth for depth in range(1, 65)], r"64 nodes and depth 64.*at most 62 deep"),
        ],
    )
    def test_paths(self, paths, words):
        with pytest.raises(ValueError, match=words):
            TokenTree.from_paths(paths)

    def test_constructor_wants_parents_first(self):
        with pytest.raises(ValueError, match=r"\[0, 0\] comes before its parent \[0\]"):
            TokenTree(((0, 0), (0,)))

    @pytest.mark.parametrize(
        ("widths", "words"),
        [([], "one integer >= 1"), ([2, 0], "one integer >= 1"), ([8, 16], "136 nodes"),
         ([2.5], "expected an integer")],
    )
    def test_widths(self, widths, words):
        with pytest.raises(ValueError, match=words):
            TokenTree.from_widths(widths)

    def test_validate(self):
        tree = TokenTree.from_paths([[0], [4], [0, 0], [0, 0, 0]])
        tree.validate(3, 5)
        tree.validate(5)
        with pytest.raises(ValueError, match=r"path \[0, 0, 0\] has depth 3.*only 2 heads"):
            tree.validate(2)
        with pytest.raises(ValueError, match=r"path \[4\] has rank 4.*ranks 0..3"):
            tree.validate(3, 4)

    @pytest.mark.parametrize("num_nodes", [0, -1, 3])
    def test_cut(self, num_nodes):
        with pytest.raises(ValueError, match=rf"found {num_nodes}, expected 1..2"):
            TokenTree.from_paths([[0], [1]]).cut(num_nodes)


class TestParse:
    @pytest.mark.parametrize("name", PUBLISHED_PATHS)
    def test_preset(self, name):
        assert TokenTree.parse(name).num_nodes == 63

    @pytest.mark.parametrize(
        "spec",
        [
            [2, 1],
            [[0], [1], [0, 0], [1, 0]],
            ((0,), (1,), (0, 0), (1, 0)),
            {"paths": [[0], [1], [0, 0], [1, 0]], "source": "x"},
            "[2, 1]",
            " [[0], [1], [0, 0], [1, 0]]",
            '{"paths": [[0], [1], [0, 0], [1, 0]]}',
            TokenTree.from_widths([2, 1]),
        ],
    )
    def test_every_spelling(self, spec):
        assert TokenTree.parse(spec) == TokenTree.from_widths([2, 1])

    @pytest.mark.parametrize("content", [[[0], [0, 1]], {"paths": [[0], [0, 1]], "note": 1}])
    def test_file(self, tmp_path, content):
        file = tmp_path / "tree.json"
        file.write_text(json.dumps(content))
        for spec in (file, str(file)):
            assert TokenTree.parse(spec).paths == ((0,), (0, 1))

    def test_save_and_load_keep_order_and_extras(self, tmp_path):
        metadata = {"source": "calibration", "expected_tokens_per_step": 2.25, "seed": 3}
        tree = TokenTree.from_paths([[0], [0, 0], [1]], metadata)
        tree.save(tmp_path / "tree.json")
        loaded = TokenTree.load(tmp_path / "tree.json")
        assert loaded == tree and loaded.paths == tree.paths
        assert loaded.metadata == metadata
        content = json.loads((tmp_path / "tree.json").read_text())
        assert content["paths"] == [[0], [0, 0], [1]]

    def test_saved_file_always_has_the_known_keys(self, tmp_path):
        TokenTree.from_paths([[0]]).save(tmp_path / "t.json")
        assert json.loads((tmp_path / "t.json").read_text()) == {
            "paths": [[0]], "source": None, "expected_tokens_per_step": None,
        }

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("mc_sim", r"'mc_sim' is not a published tree"),
            ("nowhere/tree.json", r"nowhere/tree.json does not exist"),
            ("[1, 2", r"not valid JSON"),
            ("[]", r"at least one node"),
            ({"path": []}, r"keys \['path'\], expected a key \"paths\""),
            ({"paths": 4}, r"\"paths\" is 4"),
            ({"paths": [2, 1]}, r"found 2 where a path"),
            ([[0], 1], r"found 1 where a path"),
            (7, r"found 7, expected a list"),
            (None, r"found None, expected a list"),
        ],
    )
    def test_refusals(self, spec, words):
        with pytest.raises(ValueError, match=words):
            TokenTree.parse(spec)

    def test_error_in_a_file_names_the_file(self, tmp_path):
        file = tmp_path / "tree.json"
        file.write_text("[[0, 0]]")
        with pytest.raises(ValueError, match=r"tree.json.*\[0, 0\] has no parent \[0\]"):
            TokenTree.parse(file)
        file.write_text("[[0]")
        with pytest.raises(ValueError, match=r"cannot read .*tree.json as JSON"):
            TokenTree.parse(file)
