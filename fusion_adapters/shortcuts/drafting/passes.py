"""The model's passes in decoding by drafts: its cache, which of it is as plain greedy search makes it, and the states that it leaves."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer


class Passes:
    """Texts that a model is writing, and its cache, which holds all tokens but the last.

    Args:
        model: The model.
        ids: int64 `(B, T)`, the prompts.
        given: What else the model is called with.
        config: Of `generate`.

    Attributes:
        ids: The texts so far.
        mask: bool `(B, T)` of what was read of the prompts, False where they are padded; None where none is. Set by `prompt`.
        plain: How many passes were made by `one_by_one`.
    """

    def __init__(self, model: Any, ids: Tensor, given: dict[str, Any], config: GenerationConfig) -> None:
        self.model, self.ids, self.config = model, ids, config
        self.given = given
        self.mask: Tensor | None = None
        self.dtype = model.dtype
        self.plain = 0
        self._first = ids.shape[1] + 1  # tokens in the first pass after the prompt's
        self._read = 0  # tokens in the cache, of `ids`
        self._exact = 0  # of these, how many were read as plain greedy search reads them
        self._spare: Any = None  # the cache at `_exact`, where layers cannot be cropped so far
        self._states: dict[int, list[Tensor]] = {}
        self._fresh: dict[int, Tensor] = {}

    @property
    def cache(self) -> Any:
        """The KV cache."""
        return self.given.get("past_key_values")

    @property
    def exact(self) -> bool:
        """Whether the last pass was as plain greedy search makes it, on such a cache."""
        return self._exact == self._read

    def take(self, layer: int, state: Tensor) -> None:
        """Keeps a layer state of the pass that runs."""
        self._states.setdefault(layer, []).append(state)

    def prompt(self) -> Tensor:
        """Reads the prompts; logits `(B, 1, V)`."""
        cache = self.cache
        if isinstance(cache, DynamicCache):
            cache.activate_past_recording()
        mask = self.given.get("attention_mask")
        outputs = self.model._prefill(self.ids, self.config, self.given)
        self.given = self.model._update_model_kwargs_for_generation(outputs, self.given, is_encoder_decoder=False)
        self._read = self._exact = self.ids.shape[1]
        self._note_states()
        if mask is not None and not bool(mask.all()):
            read = next(iter(self._fresh.values())).shape[1]  # fewer than the prompt has, after a cache that was given
            self.mask = mask[:, -read:].bool()
        if not self._crops:
            self._spare = copy.deepcopy(self.cache)
        logits: Tensor = outputs.logits[:, -1:]
        return logits

    @property
    def _crops(self) -> bool:
        """Whether all layers of the cache can be cropped to any length."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def check(self, drafts: Tensor) -> Tensor:
        """Reads the last token and drafts after it, int64 `(B, k)`; logits `(B, k + 1, V)`."""
        exact = self.exact and drafts.shape[1] == 0 and self._spare is None
        logits = self._pass(torch.cat([self.ids, drafts], dim=1), 1 + drafts.shape[1])
        self._exact = self._read if exact else self._exact
        self._note_states()
        return logits

    def one_by_one(self) -> Tensor:
        """Reads what was not read so, token by token as plain greedy search does; logits `(B, 1, V)` of the last token."""
        if self._spare is None:
            self._crop(self._exact)
        else:
            self.given["past_key_values"] = copy.deepcopy(self._spare)
            self._read = self._exact
        logits = self.ids.new_empty(0)
        for end in range(self._exact + 1, self.ids.shape[1] + 1):
            logits = self._pass(self.ids[:, :end], 1)
            self.plain += 1
        self._exact = self._read
        self._spare = None if self._spare is None else copy.deepcopy(self.cache)
        self._states = {}
        return logits

    def write(self, token: Tensor) -> None:
        """Puts a token int64 `(B,)` behind each text."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)

    def keep(self) -> None:
        """Takes drafts that were wrong out of the cache and out of the states."""
        wrong = self._read - (self.ids.shape[1] - 1)
        if wrong > 0 and self._fresh:
            length = next(iter(self._fresh.values())).shape[1]
            self._fresh = {layer: state[:, : length - wrong] for layer, state in self._fresh.items()}
        self._crop(self.ids.shape[1] - 1)

    def new_states(self) -> dict[int, Tensor]:
        """Layer states `(B, T, d)` of what was read since they were last asked for."""
        found, self._fresh = self._fresh, {}
        return found

    def _note_states(self) -> None:
        self._fresh = {
            layer: states[0] if len(states) == 1 else torch.cat(states, 1) for layer, states in self._states.items()
        }
        self._states = {}

    def _crop(self, length: int) -> None:
        # layers with a window shrink to it, also where nothing is cropped
        self.cache.crop(-max(0, self._read - length))
        self._read = min(self._read, length)

    def _pass(self, ids: Tensor, count: int) -> Tensor:
        """Reads the last `count` of `ids`; logits `(B, count, V)`."""
        length = ids.shape[1]
        given = {**self.given, **self._grown(length)}
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=count, **given)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        self._read = length
        logits: Tensor = self.model(**inputs, return_dict=True).logits[:, -count:]
        return logits

    def _grown(self, length: int) -> dict[str, Tensor]:
        """Arguments by position, for texts of a length."""
        found: dict[str, Tensor] = {}
        more = length - self._first
        mask, places, kinds = (self.given.get(n) for n in ("attention_mask", "position_ids", "token_type_ids"))
        if mask is not None:
            found["attention_mask"] = F.pad(mask, (0, more), value=1)
        if kinds is not None:
            found["token_type_ids"] = torch.cat([kinds, kinds[:, -1:].expand(-1, more)], dim=1)
        if places is not None:
            ahead = torch.arange(1, 1 + more, device=places.device)
            found["position_ids"] = torch.cat([places, places[..., -1:] + ahead], dim=-1)
        return found
