"""Decoding by drafts: the drafter writes a few tokens ahead, and one pass of the model checks them all. No token changes by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

from ...backbone.record import recorded
from .drafter import Drafter
from .loop import Drafts, Proposer
from .passes import Passes

# How far apart two logits must be, over the largest, to come in the same order whether tokens are read one by one or together.
TIES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_WITHOUT = "Leave it out, or write without drafts."


@dataclass(frozen=True)
class DraftingOptions:
    """How far the drafter writes ahead.

    Attributes:
        most: Tokens drafted for one pass at most.
        enough: A token is drafted while the probability that all so far are right, as the drafter has it, is at least that; 0 drafts
            `most` each time.
        ties: Greedy search: where the two best logits are closer than this, over the largest, the token is decided by plain steps, see
            `DraftedDecoding`. None for 2e-5 in float32, 1e-2 in float16, 5e-2 in bfloat16; 0 to do without.

    Raises:
        ValueError: If an option cannot be.
    """

    most: int = 2
    enough: float = 0.1
    ties: float | None = None

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ValueError(f"most={self.most}: draft at least 0 tokens for a pass (0 drafts none).")
        if not 0 <= self.enough <= 1:
            raise ValueError(f"enough={self.enough}: it is a probability, from 0 to 1.")
        if self.ties is not None and not self.ties >= 0:
            raise ValueError(f"ties={self.ties}: it must be 0 or more.")


@dataclass
class DraftCounts:
    """What came of drafts, in all texts so far.

    Attributes:
        tokens: Tokens written, that of a prompt's pass among them; a batch counts as one text.
        passes: Passes of the model that check drafts or write the next token, those of prompts not among them.
        plain: Passes more, that decided near ties.
        drafted: How often a first, second, .. token was drafted.
        accepted: How often it was right.
    """

    tokens: int = 0
    passes: int = 0
    plain: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens beside those of prompts' passes, over all passes."""
        return self.tokens / max(1, self.passes + self.plain)

    def count(self, drafted: int, accepted: int) -> None:
        """Notes one check."""
        while len(self.drafted) < drafted:
            self.drafted.append(0)
            self.accepted.append(0)
        for step in range(drafted):
            self.drafted[step] += 1
            self.accepted[step] += step < accepted


class DraftedDecoding:
    """Greedy search and sampling by drafts, for `generate`.

    ```python
    decoding = DraftedDecoding(load_drafter("drafter", model))
    model.generate(**inputs, max_new_tokens=64, custom_generate=decoding)
    ```

    **Greedy search** gives the tokens of plain greedy search. To read several tokens in one pass rounds otherwise than to read them one
    by one, so where the two best logits are all but equal the larger can be another one. There the keys and values that came of such
    passes are dropped, the tokens behind them read again one by one, as plain greedy search does, and the token is decided by that. No
    token is read again twice. Near ties are rare in float32; in 16 bits they are not, and cost much of what drafts save.

    **Sampling** accepts a drafted token with probability `min(1, p / q)`, else draws from `max(0, p - q)` (Leviathan et al., arXiv
    2211.17192, algorithm 1): the distribution of plain sampling, though not its random numbers. Processors (temperature, top-k, ...) act
    on `p`.

    In a batch all texts go on by as many tokens as the one with the fewest right drafts.

    transformers hands neither `streamer` nor `tokenizer` to a function in `custom_generate`: for these, call `generate` of this class.

    Args:
        drafter: The drafter of the model.
        options: How far it writes ahead.

    Attributes:
        counts: What came of drafts so far; put a new `DraftCounts()` there to count anew.
    """

    def __init__(self, drafter: Drafter, options: DraftingOptions | None = None) -> None:
        self.drafter = drafter
        self.options = options or DraftingOptions()
        self.counts = DraftCounts()

    def generate(self, inputs: Tensor | None = None, *, streamer: Any = None, **given: Any) -> Any:
        """`generate` of the model with this decoding; streamers and stop strings work here, too.

        Args:
            inputs: As `generate` of transformers takes it.
            streamer: Is handed the prompt and then each token.
            **given: All else that `generate` takes.
        """
        stop, tokenizer = given.pop("stop_strings", None), given.pop("tokenizer", None)
        if stop is not None:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer that tells what text the tokens are: give tokenizer=.")
            criteria = StoppingCriteriaList(given.pop("stopping_criteria", None) or [])
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop))
            given["stopping_criteria"] = criteria
        # transformers takes a streamer and does not hand it on
        streaming = partial(self, streamer=streamer)
        return self.drafter.model.generate(inputs, streamer=streamer, custom_generate=streaming, **given)  # type: ignore[operator]

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Writes; called by transformers.

        Raises:
            ValueError: If the model is not that of the drafter, or something is asked for that drafts cannot give.
        """
        _check(self.drafter, model, generation_config, model_kwargs, synced_gpus)
        passes = Passes(model, input_ids, model_kwargs, generation_config)
        with torch.no_grad(), recorded(self.drafter.backbone, self.drafter.layers, passes.take):
            return _Writing(self, passes, logits_processor, stopping_criteria, generation_config, streamer).write()


class _Writing:
    """One call of `generate`."""

    def __init__(
        self,
        decoding: DraftedDecoding,
        passes: Passes,
        processors: Any,
        criteria: StoppingCriteriaList,
        config: Any,
        streamer: Any,
    ) -> None:
        self.options, self.counts = decoding.options, decoding.counts
        self.passes, self.processors, self.criteria, self.config = passes, processors, criteria, config
        self.streamer = streamer
        self.drafter = decoding.drafter
        self.latest: Any = None  # the scores that were computed last
        ids = passes.ids
        self.unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        self.ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad: Any = config._pad_token_tensor
        keeps = bool(config.return_dict_in_generate)
        self.scores: Any = () if keeps and config.output_scores else None  # of tensors (B, V)
        self.logits: Any = () if keeps and config.output_logits else None
        wanted = decoding.options.ties
        self.ties = TIES.get(passes.dtype, 5e-2) if wanted is None else wanted

    def write(self) -> GenerateDecoderOnlyOutput | Tensor:
        logits = self.passes.prompt()[:, -1]  # (B, V)
        done = self._emit(self._chosen(logits, None, 0), logits)
        proposer = Proposer(
            self.drafter, self.options.enough, self.passes.mask, self.processors, bool(self.config.do_sample)
        )
        while not done:
            room = self.config.max_length - self.passes.ids.shape[1] - 1
            drafts = proposer.draft(self.passes.new_states(), self.passes.ids, min(self.options.most, room), self.unfinished)
            done = self._check_drafts(drafts, self.passes.check(drafts.tokens))
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.passes.ids
        written: Any = self.passes.ids
        return GenerateDecoderOnlyOutput(
            sequences=written, scores=self.scores, logits=self.logits, past_key_values=self.passes.cache
        )

    def _check_drafts(self, drafts: Drafts, logits: Tensor) -> bool:
        """Takes over the drafts that are right, and the token after them; returns whether the text has ended.

        Args:
            drafts: `k` tokens of each text.
            logits: `(B, k + 1, V)` of the model.
        """
        count, right = drafts.tokens.shape[1], 0
        self.counts.passes += 1
        done, again = False, False
        for i in range(count + 1):
            raw = logits[:, i]
            token = self._chosen(raw, drafts, i)
            if token is None:
                before = self.passes.plain
                raw, again = self.passes.one_by_one()[:, -1], True
                self.counts.plain += self.passes.plain - before
                token = self._scored(raw).argmax(-1)
            same = i < count and not bool(((token != drafts.tokens[:, i]) & self.unfinished.bool()).any())
            right += same
            done = self._emit(token, raw)
            if done or again or not same:
                break
        self.counts.count(count, right)
        self.passes.keep()
        return done

    def _chosen(self, logits: Tensor, drafts: Drafts | None, step: int) -> Any:
        """The next token of each text, int64 `(B,)`; None where a tie is to be decided by plain steps.

        Args:
            logits: `(B, V)`.
            drafts: What was drafted; None after the prompt, which is read as ever.
            step: Which draft it may be.
        """
        scores = self._scored(logits)
        if self.config.do_sample:
            chances = scores.softmax(-1)
            if drafts is not None and step < drafts.tokens.shape[1]:
                return _accepted(chances, drafts.chances[step], drafts.tokens[:, step])
            return torch.multinomial(chances, num_samples=1)[:, 0]
        if drafts is not None and not self.passes.exact and _tied(scores, logits, self.unfinished, self.ties):
            return None
        return scores.argmax(-1)

    def _scored(self, logits: Tensor) -> Tensor:
        """Scores `(B, V)` after the processors, float32."""
        logits = logits.to(device=self.passes.ids.device, dtype=torch.float32, copy=True)
        self.latest = self.processors(self.passes.ids, logits)
        scores: Tensor = self.latest
        return scores

    def _emit(self, token: Tensor, logits: Tensor) -> bool:
        """Writes one token of each text; returns whether all have ended."""
        if self.logits is not None:
            self.logits += (logits.float(),)
        if self.scores is not None:
            self.scores += (self.latest,)
        if self.ends:
            token = token * self.unfinished + self.pad.to(token.device) * (1 - self.unfinished)
        self.passes.write(token)
        self.counts.tokens += 1
        self.unfinished = self.unfinished & ~self.criteria(self.passes.ids, self.scores)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return not bool(self.unfinished.any())


def _tied(scores: Tensor, logits: Tensor, unfinished: Tensor, ties: float) -> bool:
    """Whether in a text that goes on the two best scores `(B, V)` are closer than `ties` times the largest logit."""
    if not ties:
        return False
    (first, second), scale = scores.topk(2, dim=-1).values.unbind(-1), logits.abs().amax(-1)
    return bool(((first - second <= ties * scale) & unfinished.bool()).any())


def _accepted(chances: Tensor, drafted: Tensor, token: Tensor) -> Tensor:
    """The drafted token where it is accepted, else one drawn from what the draft lacks.

    Args:
        chances: `p`, `(B, V)`.
        drafted: `q`, `(B, V)`.
        token: int64 `(B,)`, drawn from `q`.
    """
    p, q = chances.gather(1, token[:, None]), drafted.gather(1, token[:, None])  # (B, 1)
    accepted = torch.rand_like(p) * q < p
    rest = (chances - drafted).clamp_min(0)
    rest = rest.where(rest.sum(-1, keepdim=True) > 0, chances)  # p = q up to rounding: nothing is ever rejected
    return torch.where(accepted, token[:, None], torch.multinomial(rest, num_samples=1))[:, 0]


def _check(drafter: Drafter, model: nn.Module, config: GenerationConfig, given: dict[str, Any], synced: bool) -> None:
    if model is not drafter.model:
        raise ValueError(
            "The drafter was loaded for another model object than the one that writes. Load it for this one: load_drafter(folder, model)."
        )
    if config.num_beams > 1 or config.penalty_alpha or config.num_beam_groups not in (None, 1):
        raise ValueError(f"Drafts serve greedy search and sampling, not beams (num_beams={config.num_beams}). {_WITHOUT}")
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            f"output_attentions and output_hidden_states are not gathered from passes over several tokens. {_WITHOUT}"
        )
    static = config.cache_implementation in ("static", "hybrid", "sliding_window", "quantized", "offloaded_static")
    if static or isinstance(given.get("past_key_values"), StaticCache):
        raise ValueError(
            "Wrong drafts are taken out of the cache again, which takes a dynamic one. Leave cache_implementation unset."
        )
    if not given.get("use_cache"):
        raise ValueError("Drafts need the KV cache. Leave use_cache=False out.")
    if synced:
        raise ValueError(f"Processes that generate in step (synced_gpus) would draft differently many tokens. {_WITHOUT}")
