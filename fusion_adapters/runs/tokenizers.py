"""Tokenizers as a recipe names them: words keep the pieces of running text, and padding is where the model looks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import normalizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..tasks.base import Task
from .pretrained import load_pretrained
from .recipe import BackboneRecipe

BROKEN, REST = "\N{REPLACEMENT CHARACTER}", "\N{MIDLINE HORIZONTAL ELLIPSIS}"
LONGEST_CHARACTER = 4  # bytes of UTF-8


def load_tokenizer(recipe: BackboneRecipe, task: Task) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token; it pads on the right, as labels are.

    For sentences given as words, it makes of each word the pieces that the word has in running text.

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ValueError: If there is only a slow tokenizer, which does not tell which piece belongs to which word.
    """
    tokenizer = load_pretrained(AutoTokenizer, recipe)
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {recipe.model!r} is a slow one and cannot map word pieces to words. Use a model with a fast tokenizer."
        )
    if task.of_words and not _spaces_words(tokenizer):
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = load_pretrained(AutoTokenizer, recipe, add_prefix_space=True)
        if not _spaces_words(tokenizer):  # Llama 3, Qwen2, Gemma and their like know no such switch, or do not heed it
            backend = tokenizer.backend_tokenizer
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *own])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _spaces_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the second of two words has the same pieces as in running text, where a space comes before it."""
    words = tokenizer(["a", "b"], is_split_into_words=True, add_special_tokens=False)
    second = [piece for piece, word in zip(words["input_ids"], words.word_ids(), strict=True) if word == 1]
    first, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a b"))
    return both == first + second


def match_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a model which padding token the tokenizer uses: a head for whole texts looks for the last token before it."""
    if tokenizer.pad_token_id is None:
        return
    config: Any = model.config
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id


def pieces_as_text(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[str]:
    """The text of each word piece, as the tokenizer itself puts it: of byte-level pieces too, whose bytes it writes as other letters.

    Special tokens keep their names, and pieces within a word the mark that their tokenizer gives them (BERT's `##`). Of a character
    that is cut into several pieces, the first has the character and the others `REST`.
    """
    special, texts = set(tokenizer.all_special_tokens), []  # type: ignore[var-annotated]
    while len(texts) < len(pieces):
        here = len(texts)
        if pieces[here] in special:
            texts.append(pieces[here])
            continue
        for end in range(here + 1, min(here + LONGEST_CHARACTER, len(pieces)) + 1):
            text = tokenizer.convert_tokens_to_string(list(pieces[here:end]))
            if BROKEN not in text:
                break
        else:  # half a character, as where a text was cut off
            text, end = BROKEN, here + 1
        texts += [text or " ", *[REST] * (end - here - 1)]  # a mark for a blank alone is no text
    return texts
