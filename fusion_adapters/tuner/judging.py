"""Adapters that judge while a model writes: `generate` with the fusions in its passes, and the heads once over the whole texts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from ..backbone.families import CACHES, positions_in
from .collecting import Collector, Judge, Watched
from .judgement import Judged, Judgement, Labels, answer
from .stopping import StopWhen

_CRITERIA = "_get_stopping_criteria"  # where transformers' generate puts its criteria and the caller's together
_ALONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_AFTERWARDS = (
    "Leave it out, or write without judges (generate of the model itself) and judge afterwards: many(input_ids=sequences)."
)


class JudgesWriting:
    """What `ManyAdapters` does beside a language model that writes."""

    _chosen: Any  # the names of adapters, checked

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        adapters: Sequence[str] | None = None,
        read_last: bool = False,
        **given: Any,
    ) -> Judged:
        """Writes text as the language model does, to the same token, and judges prompt and answer by the passes that write it.

        ```python
        many = ManyAdapters.from_pretrained(AutoModelForCausalLM.from_pretrained(name), {"toxic": "adapters/toxic"})
        stop = many.stop_when("toxic", above=0.9)
        answer = many.generate(**tokenizer(prompts, return_tensors="pt"), max_new_tokens=64, stopping_criteria=[stop])
        answer.sequences, answer["toxic"].probability("toxic")
        ```

        Judged is what the backbone has read, `sequences[:, :-1]`: nothing reads the token that is written last. Fused states are kept
        until the end, one vector for each token and adapter, and the heads then run once.

        Args:
            inputs: As `generate` of transformers takes it.
            generation_config: Likewise.
            adapters: The names of those that judge; None for all.
            read_last: Whether one pass more reads the last token, so that all of `sequences` is judged. Without a cache that grows
                (`use_cache=False`, a static one) it reads the whole text again.
            **given: All else that `generate` takes: greedy search and sampling, streamers, stopping criteria, caches.

        Returns:
            What `generate` returns, and a `Judgement` of each adapter.

        Raises:
            ValueError: Before anything is written: if there is no adapter of that name, its fusion mixes positions, the model writes no
                text, or texts are not written token by token (beams, assistants).
        """
        return _generate(self, inputs, generation_config, self._chosen(adapters), given, read_last)

    def stop_when(self, adapter: str, label: str | int | None = None, *, above: float, every: int = 1) -> StopWhen:
        """A stopping criterion for `generate`: a text ends as soon as an adapter gives a label more than a probability.

        A head over whole texts is asked about the text so far; one over tokens about the tokens that were read since it was asked last,
        of a prompt the last one, and the likeliest counts. So far is what the backbone has read, which the token written last is not.

        Args:
            adapter: The adapter's name.
            label: The label, by name or number; None for the second of two, and for the number of a regression.
            above: The probability, or of a regression the number.
            every: To look each so many tokens only.

        Raises:
            ValueError: If there is no such adapter or label.
        """
        (name,) = self._chosen([adapter])
        return StopWhen(self, name, label, above, every)


def _generate(
    many: Any,
    inputs: Tensor | None,
    generation_config: GenerationConfig | None,
    names: Sequence[str],
    given: dict[str, Any],
    read_last: bool,
) -> Judged:
    """See `JudgesWriting.generate`.

    Args:
        many: The `ManyAdapters`.
        inputs: As `generate` takes it.
        generation_config: Likewise.
        names: The adapters that judge.
        given: All else that `generate` was given.
        read_last: See there.
    """
    host = many.host
    _check_writer(many)
    if many._plain is not None:  # what was set there since the adapters were loaded
        host.generation_config = many._plain.generation_config
    config = _resolved(host, generation_config, given)
    ids = given.get("input_ids") if inputs is None else inputs
    _check_mode(config, given)
    _check_inputs(given)
    fusings = {name: many._fusing([name]).fusings[0] for name in names}
    _check_fusions(names, fusings)
    _check_criteria(many, names, given.get("stopping_criteria") or ())
    judges = [Judge(name, fusing) for name, fusing in fusings.items()]
    collector = Collector(judges, many._backbone.num_layers, _real(ids, config, given))
    ours = {"disable_compile": True, **({"return_dict_in_generate": True} if read_last else {})}
    if generation_config is None:
        given.update(ours)
    else:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**ours)
    _watch(many)
    with many._fuses_with(collector):
        output = host.generate(inputs, generation_config=generation_config, **given)
        if read_last:
            _read_last(many, collector, output)
            output = output if config.return_dict_in_generate else output.sequences
    return _judged(many, collector, output)


def _read_last(many: Any, collector: Collector, output: Any) -> None:
    """One pass more, over the token that was written last."""
    ids, host = output.sequences, many.host
    if collector.prompt is None or collector.read >= ids.shape[1]:
        return
    found = next(((name, output[name]) for name in CACHES if output.get(name) is not None), None)
    # a static cache has no place for it
    grows = found is not None and (isinstance(found[1], DynamicCache) or not getattr(found[1], "is_compileable", False))
    mask = collector.shown(ids.shape[1])
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": grows}
    if found is not None and grows:
        given[found[0]] = found[1]
    given = host.prepare_inputs_for_generation(
        ids, next_sequence_length=1 if grows else None, is_first_iteration=False, **given
    )
    with torch.no_grad():
        many._backbone.base(**{name: value for name, value in given.items() if name in many._takes})


def _judged(many: Any, collector: Collector, output: Any) -> Judged:
    """Runs the heads over what was read."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    read = min(collector.read, sequences.shape[1])
    if collector.prompt is None or read < sequences.shape[1] - 1:
        raise RuntimeError(
            f"{type(many.host).__name__} writes by a generate of its own: of {sequences.shape[1]} positions, {read} could be followed, so "
            "nothing can be judged on the way. Generate without judges and call many(input_ids=sequences)."
        )
    collector.catch_up(collector.judges.values())
    ids, mask = sequences[:, :read], collector.mask(read).to(sequences.device)
    judgements = {}
    for name, judge in collector.judges.items():
        state = judge.state()[:, :read]
        if name in many._of_texts:  # the mean of a whole text, whichever of its positions the head picks, as in one pass
            ends = (mask * torch.arange(read, device=mask.device)).argmax(1).to(state.device)
            state = state.take_along_dim(ends[:, None, None], 1).expand_as(state)
        found = answer(many, name, state, ids, mask)
        judgements[name] = Judgement(found, mask, Labels(many, name))
    return Judged(output, judgements)


def _watch(many: Any) -> None:
    """Has the host tell of the lengths and ends of texts: which text ended when is not in what `generate` returns."""
    host = many.host
    if _CRITERIA in vars(host):
        return
    own = getattr(host, _CRITERIA)

    def watched(*args: Any, **kwargs: Any) -> Any:
        criteria, collector = own(*args, **kwargs), many.begin()
        return Watched(criteria, collector) if isinstance(collector, Collector) else criteria

    setattr(host, _CRITERIA, watched)


def _resolved(host: Any, generation_config: GenerationConfig | None, given: dict[str, Any]) -> GenerationConfig:
    """The settings of a call, as `generate` itself finds them: its arguments, then the config's, then the model's own."""
    config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    config.update(**host.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    config.update(**given)
    return config


def _real(ids: Tensor | None, config: GenerationConfig, given: dict[str, Any]) -> Tensor | None:
    """Which positions of the prompts are no padding, bool, one row a text; None if all are. As `generate` finds it."""
    mask = given.get("attention_mask")
    if mask is None and ids is not None and config.pad_token_id is not None:
        pad, ends = config.pad_token_id, config.eos_token_id
        if pad not in (ends if isinstance(ends, list) else [ends]):
            mask = ids != pad
    if mask is None or bool((mask != 0).all()):
        return None
    return (mask != 0).repeat_interleave(config.num_return_sequences or 1, 0)


# what is refused


def _check_writer(many: Any) -> None:
    host = many.host
    if not (hasattr(host, "generate") and host.can_generate()):
        raise ValueError(
            f"These adapters stand on a {type(host).__name__}, which writes no text. Make them of a causal language model: "
            "ManyAdapters.from_pretrained(AutoModelForCausalLM.from_pretrained(...), {'name': folder})."
        )
    if not many._backbone.causal or getattr(host.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(host).__name__} is no decoder in which a position sees those before it alone: what it has read would change with "
            f"each token. {_AFTERWARDS}"
        )


def _check_mode(config: GenerationConfig, given: dict[str, Any]) -> None:
    """Raises ValueError unless each text is written by itself, token by token, each pass being that of the next token."""
    mode, own = config.get_generation_mode(given.get("assistant_model")), given.get("custom_generate")
    if mode not in _ALONE or own is not None:
        settings = {
            "num_beams": None if config.num_beams == 1 else config.num_beams,
            "assistant_model": given.get("assistant_model"),
            "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
            "penalty_alpha": config.penalty_alpha,
        }
        way = "custom_generate" if own is not None else mode.value.replace("_", " ")
        asked = [f"{k}={v}" if isinstance(v, (int, float)) else k for k, v in settings.items() if v is not None]
        raise ValueError(
            f"Judges follow texts that are written token by token, by greedy search or sampling, and this call asks for {way}"
            f"{f' ({asked[0]})' if asked and own is None else ''}, in which texts may change places, or tokens be tried and dropped. "
            f"{_AFTERWARDS}"
        )
    for name, value, unasked in (
        ("guidance_scale", config.guidance_scale, 1),
        ("token_healing", config.token_healing, False),
        ("cache_implementation", config.cache_implementation == "paged" and "paged", False),
    ):
        if value not in (None, unasked):
            raise ValueError(
                f"{name}={value!r} runs the model on other texts beside or before those that are written, which judges cannot tell "
                f"apart. {_AFTERWARDS}"
            )
    if config.compile_config is not None:
        raise ValueError(
            "compile_config asks for a compiled pass, and judges read the layer states while it runs. Leave compile_config out; a static "
            "cache works without it."
        )


def _check_inputs(given: dict[str, Any]) -> None:
    if given.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds bring a prompt without token ids, which the adapters' heads look for. Give input_ids, or write without "
            "judges."
        )
    held = max(positions_in(given.get(name)) for name in CACHES)
    if held:
        raise ValueError(
            f"past_key_values holds {held} positions already, whose layer states are no more, so the texts could not be judged as a "
            f"whole. Give whole texts without past_key_values, or write without judges and call many(input_ids=sequences)."
        )


def _check_fusions(names: Sequence[str], fusings: dict[str, Any]) -> None:
    mixing = [name for name in names if fusings[name].fusion.mixes_positions]
    if mixing:
        kinds = ", ".join(f"{name!r} ({type(fusings[name].fusion).__name__})" for name in mixing)
        raise ValueError(
            f"The fusion of {kinds} reads other positions of the text, and the pass that writes a token shows that one alone: the others "
            "lie in the KV cache, where their layer states are no more. Name the other adapters (adapters=[...]) and judge with this one "
            f"afterwards, many(input_ids=sequences, adapters={mixing})."
        )


def _check_criteria(many: Any, names: Sequence[str], criteria: Any) -> None:
    for criterion in criteria:
        if isinstance(criterion, StopWhen) and (criterion.many is not many or criterion.name not in names):
            raise ValueError(
                f"stopping_criteria holds a stop_when({criterion.name!r}), but {criterion.name!r} does not judge here: "
                + (f"adapters={list(names)}. Add it there." if criterion.many is many else "it is of another ManyAdapters.")
            )
