"""Fusion, head and what lies between them as one program of `torch.export`: layer states in, the model's answer out, no backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..backbone.blocks import Backbone
from ..backbone.fed import fed, watched
from .active import adapters_in_use
from .layer import FusionLayer, fusion_layers
from .replay import layers_read

BESIDE = ("attention_mask", "input_ids")  # what a program may want besides states
# How far an answer may be from the live one, in shares of the largest: rounding of float32, and of 16 bits.
FAR, FAR_IN_16_BITS = 1e-4, 3e-2
_ASSERTED = torch.ops.aten._assert_tensor_metadata.default
_SIZE = torch.ops.aten.sym_size.int
_OF_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")  # file names among them


@dataclass
class Program:
    """An exported program, and what its caller must know.

    Attributes:
        exported: The program. It is called with keywords: `states`, `(N, B, T, d)` of any float dtype, and those of `BESIDE` that it
            wants, int64 `(B, T)`.
        layers: The numbers of the layers that `states` holds, ascending.
        beside: What it wants besides.
        dtype: To which the states are cast first, that of the live model's.
        width: Their width `d`.
        shape: The shape of its answer, `("batch", "positions", K)` or `("batch", K)`.
        answer: The dtype of its answer.
        listed: Those of the layers that `hidden_states` of transformers holds under the same number; None where that was not to be seen.
    """

    exported: ExportedProgram
    layers: tuple[int, ...]
    beside: tuple[str, ...]
    dtype: torch.dtype
    width: int
    shape: tuple[str | int, ...]
    answer: torch.dtype
    listed: tuple[int, ...] | None


def export_program(model: nn.Module, batch: Mapping[str, Tensor]) -> Program:
    """Exports what a model does with the layer states of its backbone.

    The model's own call is traced, with given states in the place of the blocks: what reads the states, what comes after them, and the
    choice of a position stay as they are. Of the weights those stay on which the answer depends.

    Args:
        model: A model with an active adapter, in evaluation mode. No other thread may use it meanwhile.
        batch: `input_ids` and `attention_mask`, of more than one row and position: the sizes are free in the program.

    Raises:
        ValueError: If the adapter is of a kind that has no such program.
    """
    layer = exportable(model)
    inner = _without_peft(model)
    with torch.no_grad():
        states, answer, forms = _live(inner, layer, batch)
        tail = _Tail(inner, layer.running, layers_read(layer), forms, states.dtype)
        exported, beside = _traced(tail, states, batch)
        listed = _listed(inner, layer, batch)
    shape: tuple[str | int, ...] = (*("batch", "positions")[: answer.dim() - 1], answer.shape[-1])
    return Program(exported, tail.layers, beside, states.dtype, states.shape[-1], shape, answer.dtype, listed)


def exportable(model: nn.Module) -> FusionLayer:
    """The fusion layer of a model whose answer depends on its backbone by layer states alone.

    Raises:
        ValueError: If it is an encoder-decoder, or has no active fusion, or something of the adapter works inside the backbone.
    """
    layers = fusion_layers(model)
    if not layers or layers[0].active_fusion is None:
        raise ValueError(
            f"{type(model).__name__} has no active fusion, so there is nothing to export. Attach a FusionConfig by get_peft_model, or "
            "enable its adapter."
        )
    if layers[0].backbone.stack is not None:
        raise ValueError(
            f"{type(_without_peft(model)).__name__} is an encoder-decoder: after its {layers[0].backbone.stack} comes the other stack, or "
            "it has read that one already, so its answer is no function of the layer states of one stack. Export a run on an encoder or a "
            "decoder alone (BERT, Llama, Qwen, ...), or serve this one with transformers (PeftModel)."
        )
    inside = adapters_in_use(layers[0].running)
    if inside != "none":
        raise ValueError(
            f"The adapter works inside the backbone too ({inside}: LoRA, or modules_to_save before the blocks). A backbone that runs "
            "elsewhere has no part of it: its layer states would be others, and the scores wrong without a sign. Export a run of the "
            "fusion alone (no r, target_modules or other option of LoRA), or serve this one with transformers (PeftModel)."
        )
    return layers[0]


def largest_difference(
    program: Program, call: Callable[..., Tensor], model: nn.Module, batches: Sequence[Mapping[str, Tensor]]
) -> float:
    """The largest difference between a program's answers and the live model's, in shares of the largest answer.

    Args:
        program: The program.
        call: Its module, `program.exported.module()` or what was loaded from its file.
        model: The model.
        batches: `input_ids` and `attention_mask`, of other sizes than the one that was traced.

    Raises:
        ValueError: If they are not the same up to rounding.
    """
    layer, inner, far, sizes = exportable(model), _without_peft(model), 0.0, []
    with torch.no_grad():
        for batch in batches:
            sizes.append("x".join(map(str, batch["input_ids"].shape)))
            states, expected, _ = _live(inner, layer, batch)
            try:
                found = call(states=states, **{name: batch[name] for name in program.beside})
            except (RuntimeError, AssertionError) as error:  # a size that the trace has taken for fixed
                raise _unlike(inner, layer, sizes, " ".join(str(error).split())[:200]) from error
            if found.shape != expected.shape or found.dtype != expected.dtype:
                told = f"{list(found.shape)} {found.dtype} and {list(expected.shape)} {expected.dtype}"
                raise _unlike(inner, layer, sizes, f"the answers are {told}")
            found, expected = found.float(), expected.float()
            far = max(far, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)))
            if not far <= (FAR if program.dtype.itemsize >= 4 else FAR_IN_16_BITS):
                raise _unlike(inner, layer, sizes, f"they differ by {far:.2g} of the largest answer")
    return far


def _unlike(model: nn.Module, layer: FusionLayer, sizes: Sequence[str], what: str) -> ValueError:
    return ValueError(
        f"The program that was traced of {type(model).__name__} with {type(layer.active_fusion).__name__} does not answer as the model "
        f"does (on batches of {', '.join(sizes)} positions: {what}): something besides the layer states reaches fusion or head. It cannot "
        "be exported; serve it with transformers (PeftModel), and tell us of it."
    )


class _Tail(nn.Module):
    """The model without its blocks: what is traced."""

    backbone: Backbone

    def __init__(
        self, model: nn.Module, backbone: Backbone, layers: tuple[int, ...], forms: list[Any], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self.layers, self.forms, self.dtype = layers, forms, dtype
        self.__dict__["backbone"] = backbone  # no module: it is none, and torch must not see its blocks

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, input_ids: Tensor | None = None) -> Tensor:
        # where the answer does not depend on it, any will do
        if attention_mask is None:
            attention_mask = states.new_ones(states.shape[1:3], dtype=torch.long)
        if input_ids is None:
            input_ids = states.new_zeros(states.shape[1:3], dtype=torch.long)
        given = dict(zip(self.layers, states.to(self.dtype).unbind(0), strict=True))
        with fed(self.backbone, self.forms, given):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def _without_peft(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _live(model: nn.Module, layer: FusionLayer, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Any]]:
    """The states `(N, B, T, d)` of a batch, the model's answer, and how its blocks answer."""
    with watched(layer.running) as found:
        answer = getattr(model(**batch), "logits", None)
    if answer is None:
        raise ValueError(
            f"{type(model).__name__} answers with no logits: a program is for heads over tokens, over texts and over word pieces. Load the "
            "backbone with such a head, or serve it with transformers (PeftModel)."
        )
    last = found.states[layer.running.num_layers]
    return torch.stack([found.states[i].to(last.device) for i in layers_read(layer)]), answer, found.forms


def _traced(tail: _Tail, states: Tensor, batch: Mapping[str, Tensor]) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The program, and which of `BESIDE` it wants."""
    beside: tuple[str, ...] = BESIDE
    # in a dtype of nobody's: the cast to the model's own then stands in the program, and takes any
    states = states.double()
    while True:
        inputs = {"states": states, **{name: batch[name] for name in beside}}
        free = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in beside}
        with fed(tail.backbone, tail.forms, {}):  # without the blocks' weights, which may be quantised
            exported = torch.export.export(
                tail,
                (),
                kwargs=inputs,
                dynamic_shapes={"states": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}, **free},
                strict=False,
            )
        # nothing is changed in place any more, so that what no answer needs is seen
        exported = exported.run_decompositions({})
        wanted = _used(exported)
        if wanted == beside:
            _prune(exported)
            return exported, beside
        beside = wanted


def _used(exported: ExportedProgram) -> tuple[str, ...]:
    """Takes out of a program what its answer does not depend on; returns what is then used of `BESIDE`."""
    graph = exported.graph_module.graph
    for node in [node for node in graph.nodes if node.target is _ASSERTED]:
        graph.erase_node(node)  # they would keep the embeddings
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    # sizes can be had of the states as well
    used = {n.name for n in graph.find_nodes(op="placeholder") if any(user.target is not _SIZE for user in n.users)}
    return tuple(name for name in BESIDE if name in used)


def _prune(exported: ExportedProgram) -> None:
    """Takes out the weights that nothing uses, and the names of source files."""
    graph, signature = exported.graph_module.graph, exported.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and specs[node.name].kind != InputKind.USER_INPUT:
            graph.erase_node(node)
            signature.input_specs.remove(specs[node.name])
    kept = {spec.target for spec in signature.input_specs}
    for held in (exported.state_dict, exported.constants):
        for name in [name for name in held if name not in kept]:
            del held[name]
    for node in graph.nodes:
        for key in _OF_TRACES:
            node.meta.pop(key, None)
    exported.graph_module.recompile()
    exported.example_inputs = None  # the states of the trace, which would be saved, too
    exported.validate()


def _listed(model: nn.Module, layer: FusionLayer, batch: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Of the layers that are read, those that `hidden_states` of transformers holds as they are; None if it holds none."""
    with layer.unfused(), watched(layer.running) as found:
        held = getattr(model(**batch, output_hidden_states=True), "hidden_states", None)
    if held is None or len(held) <= layer.running.num_layers:
        return None
    same = (i for i in layers_read(layer) if torch.allclose(held[i].float(), found.states[i].float(), 1e-3, 1e-3))
    return tuple(same)
