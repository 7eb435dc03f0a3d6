"""Masks of masked language modelling: which pieces of a row are hidden, drawn once and from the row itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# BERT's shares (arXiv 1810.04805): of the pieces that are predicted, and of these by what they are replaced.
PREDICTED, HIDDEN, REPLACED = 0.15, 0.8, 0.1


class Masker:
    """Hides pieces of rows as BERT's pretraining does: 15 % are predicted, of which 80 % become the mask token, 10 % a
    random piece, and 10 % stay.

    What is hidden in a row is a function of its own ids: the same in every epoch, subset, order and process. The hidden
    row is therefore one input of the backbone, whose layer states can be computed once.

    Args:
        tokenizer: Its special tokens are never chosen, and never the random piece.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """  # noqa: D205 - the shares belong together

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mask = mask_token_of(tokenizer)
        self.special = frozenset(tokenizer.all_special_ids)
        self.ordinary = sorted(set(tokenizer.get_vocab().values()) - self.special)

    def __call__(self, pieces: Sequence[int]) -> tuple[list[int], list[int]]:
        """Hides pieces of one row.

        Args:
            pieces: The ids of a row, special tokens included.

        Returns:
            The ids with some hidden, of the same length, and the positions that are to be predicted, ascending: 15 % of
            the ordinary pieces, at least one; none if there is no ordinary piece.
        """
        candidates = [i for i, piece in enumerate(pieces) if piece not in self.special]
        digest = hashlib.blake2b(" ".join(map(str, pieces)).encode(), digest_size=8).digest()
        # only random(), whose values Python promises to keep from version to version
        draw = random.Random(int.from_bytes(digest, "big")).random
        shuffled = sorted((draw(), i) for i in candidates)
        chosen = sorted(i for _, i in shuffled[: max(1, round(PREDICTED * len(candidates)))])
        hidden = list(pieces)
        for i in chosen:
            fate = draw()
            if fate < HIDDEN:
                hidden[i] = self.mask
            elif fate < HIDDEN + REPLACED:
                hidden[i] = self.ordinary[int(draw() * len(self.ordinary))]
        return hidden, chosen


def mask_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the mask token.

    Raises:
        ValueError: If there is none.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__}, {len(tokenizer):,} pieces) has no mask token, which task: masked_lm "
            "needs. Use the backbone of a masked language model (BERT, RoBERTa, MiniLM, ...), or another task."
        )
    return int(tokenizer.mask_token_id)  # type: ignore[arg-type]
