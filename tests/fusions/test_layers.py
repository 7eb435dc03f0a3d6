"""Which layer states a fusion reads: lists, and rules."""

import pytest

from fusion_adapters.fusions import read_layers, resolve_layers


def test_layers_resolve_like_python_indices():
    assert resolve_layers(None, 4) == (1, 2, 3, 4)
    assert resolve_layers([-1, 0, 2], 4) == (0, 2, 4)
    for wrong in ([5], [-6], [2, 9]):
        with pytest.raises(ValueError, match=r"0 \(embeddings\) to 4 \(last block\)"):
            resolve_layers(wrong, 4)
    for wrong in ([], [1, 1], [4, -1]):
        with pytest.raises(ValueError, match="only once"):
            resolve_layers(wrong, 4)


def test_layers_by_a_rule():
    assert resolve_layers("every:4", 30) == (2, 6, 10, 14, 18, 22, 26, 30)
    assert resolve_layers("every:1", 4) == resolve_layers("last:4", 4) == (1, 2, 3, 4)
    assert resolve_layers("last:2", 4) == (3, 4) and resolve_layers("every:4", 4) == (4,)
    for rule in ("every:5", "last:5"):
        with pytest.raises(ValueError, match=rf"'{rule}', and there are 4 blocks. Choose a number from 1 to 4"):
            resolve_layers(rule, 4)
    for wrong in ("first:2", "every:0", "last:-1", "last", "4", 3):
        with pytest.raises(ValueError, match=r"is no choice of layers. Give a list .* 'every:4'"):
            read_layers(wrong)
