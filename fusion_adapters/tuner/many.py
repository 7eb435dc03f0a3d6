"""Several adapters in one pass of the backbone: the blocks run once, then each adapter's fusion and head answer."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbone.blocks import LAYER_NAME, Backbone, find_backbones
from ..backbone.fingerprint import fingerprints, fingerprints_differ
from ..backbone.fuse import Fuse
from ..backbone.replay import FusedState
from ..backbone.share import twin
from ..backbone.taps import Taps
from ..backbone.walk import parameters_of
from .active import adapters_in_use
from .judging import JudgesWriting
from .layer import FusionLayer, fusion_layers
from .pooling import reads_means
from .shared import load_shared
from .together import FusingMany
from .use import use_adapter

_OF_A_HEAD = ("labels", "next_sentence_label", "start_positions", "end_positions")
_OF_ONE_MODEL = ("output_hidden_states", "output_attentions", "past_key_values", "layer_states", "adapter_names")


class _Current(threading.local):
    """What fuses in the pass that this thread has under way."""

    fusing: Fuse | None = None


class ManyAdapters(JudgesWriting):
    """Adapters on one frozen backbone, which all answer from one pass of it.

    Each adapter is that of a `PeftModel` with the head that it was trained with: tags of tokens, classes of texts, a number.
    The blocks run once for all of them, on a copy of the modules that shares every weight; each fusion takes in the layer
    states as the blocks reach them, and each model then runs what comes after its blocks (final norm, pooler, head), as it does in
    a call of its own. Each answer is that of the adapter alone. For inference; several threads may call at once.

    ```python
    model = AutoModel.from_pretrained("meta-llama/Llama-3.1-8B", dtype=torch.bfloat16)
    many = ManyAdapters.from_pretrained(model, {"entities": "adapters/ner", "intent": "adapters/intent"})
    outputs = many(**tokenizer(texts, padding=True, return_tensors="pt"))
    outputs["entities"].logits, outputs["intent"].logits
    ```

    Args:
        *models: Models with fusion adapters and without LoRA, on one backbone: the same weights in memory (`share_backbone`), or equal
            ones. Every adapter of each takes part, by its name.

    Attributes:
        models: The model of each adapter, by name.

    Raises:
        ValueError: If two adapters have one name, a model has LoRA in its blocks or is an encoder-decoder, or two of them have different
            backbones.
    """

    def __init__(self, *models: PeftModel) -> None:
        if not models:
            raise ValueError(
                "ManyAdapters got no model. Give it models with fusion adapters, or use ManyAdapters.from_pretrained."
            )
        self.models: dict[str, PeftModel] = {}
        self._layers: dict[str, FusionLayer] = {}
        layers = [_layer_of(model) for model in models]
        deepest = max(range(len(models)), key=lambda i: layers[i].backbone.num_layers)
        host = twin(layers[deepest].backbone.base)
        for layer in fusion_layers(host):
            layer.taps.remove()
            delattr(layer.backbone.root, LAYER_NAME)
        self._stand_on(host)
        for model in models:
            self._take(model)

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, adapters: Mapping[str, str], heads: Mapping[str, Any] | None = None
    ) -> ManyAdapters:
        """Loads adapters onto one backbone.

        Args:
            model: A model without adapters, with any head or none (`AutoModel.from_pretrained`). It stays as it is.
            adapters: Name of each adapter, and the folder or repository that it was saved to.
            heads: The class of an adapter's model by the adapter's name, where its `task_type` does not say it.

        Raises:
            ValueError: If an adapter does not fit the backbone, has LoRA, or its model's class is unknown.
        """
        many = cls.__new__(cls)
        many.models, many._layers = {}, {}
        many._stand_on(twin(model))
        many._plain = model
        for name, folder in adapters.items():
            many.add(name, folder, (heads or {}).get(name))
        return many

    def add(self, name: str, folder: str, head: Any = None) -> None:
        """Loads one adapter more, see `from_pretrained`."""
        if name in self.models:
            raise ValueError(f"There is an adapter {name!r} already. Give this one another name, or remove that one first.")
        if self._plain is None:
            raise ValueError(
                "These adapters came with models of their own. Load it onto one of them (model.load_adapter) and make ManyAdapters anew, "
                "or begin with ManyAdapters.from_pretrained."
            )
        self._take(load_shared(self._plain, name, folder, head, self.models.values()), only=name)

    def remove(self, name: str) -> None:
        """Takes an adapter away, and frees what it held."""
        (name,) = self._chosen([name])
        model = self.models.pop(name)
        del self._layers[name]
        self._uncached.discard(name)
        self._of_texts.discard(name)
        if any(other is model for other in self.models.values()):
            model.delete_adapter(name)

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they came."""
        return list(self.models)

    def __call__(
        self, *, adapters: Sequence[str] | None = None, labels: Mapping[str, Tensor] | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """One pass of the backbone over a batch, and what each adapter answers.

        Args:
            adapters: The names of those that are wanted; None for all.
            labels: For losses, by the name of the adapter.
            **inputs: What the models are called with: `input_ids`, `attention_mask`, ...

        Returns:
            By name, what the adapter's model returns: `logits`, and `loss` where it was given labels.

        Raises:
            ValueError: If there is no adapter of that name, or an argument is for one model alone.
        """
        names = self._chosen(adapters)
        if labels:
            self._chosen(labels)
        _check_inputs(inputs)
        with torch.no_grad():
            states = self._fused(names, inputs)
            return {name: self._answer(name, state, inputs, labels or {}) for name, state in zip(names, states, strict=True)}

    # the backbone

    def _stand_on(self, host: nn.Module) -> None:
        """Puts taps on a model whose blocks run for all adapters; it is nobody else's."""
        self._plain: PreTrainedModel | None = None
        self.host: Any = host.eval()
        self._backbone = _one_stack(find_backbones(host), type(host).__name__)
        self._current = _Current()
        self._of_texts: set[str] = set()  # those whose heads read the mean of a whole text
        self._uncached: set[str] = set()  # those whose models would make a KV cache, from which nobody goes on
        backbone = self._backbone
        self._taps = Taps(backbone.root, backbone.blocks, self, backbone.causal, backbone.hidden_size)
        self._takes = inspect.signature(backbone.base.forward).parameters
        self._marks: dict[int | None, dict[str, str]] = {}
        self._own = {id(p) for p in parameters_of(backbone.base)}

    def begin(self) -> Fuse | None:
        """For the taps: what fuses in the call of the backbone that begins now."""
        return self._current.fusing

    def _fused(self, names: Sequence[str], inputs: dict[str, Any]) -> list[Tensor]:
        """The fused state of each adapter, `(B, T, d)`, by one pass of the blocks."""
        fusing = self._fusing(names)
        self._taps.skip_above(fusing.depth)
        call = {name: value for name, value in inputs.items() if name in self._takes}
        if "use_cache" in self._takes:
            call["use_cache"] = False
        with self._fuses_with(fusing):
            self._backbone.base(**call)
        return fusing.results()

    def _fusing(self, names: Sequence[str]) -> FusingMany:
        return FusingMany([self._layers[name].fusing(name) for name in names], [name in self._of_texts for name in names])

    def _fuses_with(self, fusing: Fuse) -> _AsCurrent:
        """In the body, passes of this thread fuse with that."""
        return _AsCurrent(self._current, fusing)

    def _using(self, name: str) -> Any:
        """As `use_adapter`, without its checks, which look through the whole model."""
        calls = self._layers[name].calls
        assert calls is not None
        return calls.using((name,))

    # the adapters

    def _take(self, model: PeftModel, only: str | None = None) -> None:
        """Adds a model's adapters, or one of them."""
        layer = _layer_of(model)
        for name in [only] if only is not None else list(layer.fusions):
            if name in self.models:
                raise ValueError(
                    f"Two adapters are named {name!r}. Load each under a name of its own: PeftModel.from_pretrained(model, folder, "
                    "adapter_name='...')."
                )
            self._check_backbone(name, model, layer)
            self.models[name], self._layers[name] = model, layer
            if "use_cache" in inspect.signature(model.get_base_model().forward).parameters:
                self._uncached.add(name)
            with self._using(name):
                if reads_means(model.get_base_model(), layer):
                    self._of_texts.add(name)
        model.eval()

    def _check_backbone(self, name: str, model: PeftModel, layer: FusionLayer) -> None:
        """Raises ValueError if the adapter's layer states are not those of this backbone."""
        with use_adapter(model, name):
            running = layer.running
            inside = adapters_in_use(running)
        if inside != "none":
            raise ValueError(
                f"The adapter {name!r} trains modules before or in the blocks (modules_to_save), so its layer states are not those of the "
                "others. Call its model by itself."
            )
        here = self._backbone.lower(running.num_layers)
        if running.num_layers > self._backbone.num_layers or running.hidden_size != self._backbone.hidden_size:
            differs: str | None = (
                f"{running.num_layers} blocks of width {running.hidden_size}, and the others' has {self._backbone.num_layers} of width "
                f"{self._backbone.hidden_size}"
            )
        elif all(id(p) in self._own for block in running.blocks for p in block.parameters()):
            return
        else:
            depth = None if here.num_layers == self._backbone.num_layers else here.num_layers
            if depth not in self._marks:
                self._marks[depth] = fingerprints(self._backbone.lower(depth))
            differs = fingerprints_differ(fingerprints(running).get("v2"), self._marks[depth])
        if differs is not None:
            raise ValueError(
                f"The adapter {name!r} is attached to another backbone than the others: {differs}. One pass serves adapters of one "
                "backbone alone; make a ManyAdapters for each."
            )

    def _answer(self, name: str, state: Tensor, inputs: dict[str, Any], labels: Mapping[str, Tensor]) -> Any:
        """What an adapter's model answers from the fused state: all of it runs but the blocks."""
        given = dict(inputs, labels=labels[name]) if name in labels else dict(inputs)
        if name in self._uncached:
            given["use_cache"] = False
        with self._using(name):
            return self.models[name].get_base_model()(**given, layer_states=FusedState(state))

    def _chosen(self, names: Iterable[str] | None) -> list[str]:
        chosen = self.names if names is None else [names] if isinstance(names, str) else list(names)
        unknown, there = [name for name in chosen if name not in self.models], ", ".join(map(repr, self.models)) or "none"
        if unknown:
            raise ValueError(f"There is no adapter {', '.join(map(repr, unknown))}; there are {there}.")
        if not chosen:
            raise ValueError(f"No adapter was named, and one pass is for at least one; there are {there}.")
        return list(dict.fromkeys(chosen))


class _AsCurrent:
    """In the body, the taps of this thread fuse with what is given."""

    def __init__(self, current: _Current, fusing: Fuse) -> None:
        self.current, self.fusing = current, fusing

    def __enter__(self) -> None:
        self.before, self.current.fusing = self.current.fusing, self.fusing

    def __exit__(self, *error: object) -> None:
        self.current.fusing = self.before


def _layer_of(model: PeftModel) -> FusionLayer:
    layers = fusion_layers(model)
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no fusion adapter. Attach one by get_peft_model or PeftModel.from_pretrained."
        )
    _one_stack([layer.backbone for layer in layers], type(model.get_base_model()).__name__)
    calls = layers[0].calls
    if calls is not None and calls.layerwise:
        raise ValueError(
            f"An adapter of this model ({', '.join(map(repr, layers[0].fusions))}) holds LoRA, which changes the blocks: its layer states "
            "would not be those of the other adapters. Call that model by itself, or train a fusion without LoRA."
        )
    return layers[0]


def _one_stack(backbones: Sequence[Backbone], name: str) -> Backbone:
    if len(backbones) > 1 or backbones[0].stack is not None:
        raise ValueError(
            f"{name} is an encoder-decoder: what its decoder reads depends on the fusion of its encoder, so one pass cannot "
            "serve several. Call each adapter by itself."
        )
    return backbones[0]


def _check_inputs(inputs: dict[str, Any]) -> None:
    alone = [name for name in _OF_ONE_MODEL if inputs.get(name) is not None and inputs[name] is not False]
    alone += [name for name in _OF_A_HEAD if name in inputs]
    if alone:
        raise ValueError(
            f"{', '.join(alone)}: of several models that answer together, that belongs to one. Losses: labels={{'name': labels}}. Hidden "
            "states, attentions and KV caches: call the adapter's model, many.models['name'], with use_adapter."
        )
