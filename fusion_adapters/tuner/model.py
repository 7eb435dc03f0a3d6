"""`FusionModel`: LoRA's tuner with a fusion on top."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, PeftType, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from ..backbone.blocks import LAYER_NAME, Backbone, find_backbones
from ..backbone.fingerprint import fingerprint, join_fingerprints
from ..fusions import Fusion, build_fusion
from .binding import (
    MODEL_PREFIX,
    bind,
    check_adapter_name,
    check_layer_drop,
    check_saved_names,
    check_wrapped_tensors,
    compare_tensors,
    has_own_width,
    read_weights,
    warn_if_compiled,
    warn_if_large,
    without_embeddings,
    wrapped_keys,
)
from .budget import settle_budget
from .card import add_loading_section
from .config import FusionConfig
from .heads import check_head, name_task_heads, remove_float32_hook, train_head_in_float32
from .layer import FusionLayer, fusion_layers, replaying


class FusionModel(LoraModel):
    """LoRA's tuner with a fusion on top. Users reach it through `peft.get_peft_model`."""

    tuner_layer_cls = (LoraLayer, FusionLayer)  # type: ignore[assignment]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adds an adapter: LoRA if the config asks for it, the head, and the fusion. A failing call changes nothing.

        Raises:
            ValueError: If the config does not fit the backbone, the head is quantised or would be forgotten, or the
                adapter's file is damaged or lacks tensors.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, FusionConfig)  # peft refuses to mix methods in one model
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a PeftModel already, and two of them around one model would save each other's weights. Give "
                "get_peft_model the plain model, with FusionConfig's own LoRA fields (r, target_modules) for LoRA and fusion in "
                "one adapter; or fold the LoRA in first, by merge_and_unload()."
            )
        own_width = has_own_width(config)
        settle_budget(config, model)
        if config.has_lora:
            with _as_lora(config):  # peft renames targets in models that transformers 5 built anew, for LoRA alone
                convert_peft_config_for_transformers(config, model, None)
        backbones = find_backbones(model, config.fusion_blocks, config.fusion_stack)
        layers = {id(layer.backbone.root): layer for layer in fusion_layers(model)}
        if not layers:
            warn_if_compiled(model)
        # those of attached stacks as they were then
        backbones = [layers[id(b.root)].backbone if id(b.root) in layers else b for b in backbones]
        known = {root: layer.fingerprint for root, layer in layers.items()}
        bind(config, backbones, join_fingerprints([known.get(id(b.root)) or fingerprint(b) for b in backbones]))
        name_task_heads(config)
        check_head(model, backbones, config)
        weights = read_weights(config)
        with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
            fusions = [_fusion_for(backbone, config) for backbone in backbones]
        if not own_width:
            warn_if_large(config, fusions)
        there = [fusion for layer in layers.values() for fusion in layer.fusions.values()]
        check_saved_names(config.modules_to_save, [*fusions, *there])
        for backbone, fusion in zip(backbones, fusions, strict=True):
            check_adapter_name(adapter_name, fusion)
            if not any(p.is_meta for p in fusion.parameters()):
                fusion.to(backbone.device)

        with _undone_on_error(model), _marked_lora_free(config):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            train_head_in_float32(model, backbones, adapter_name)
            for backbone, fusion in zip(backbones, fusions, strict=True):
                layer = layers.get(id(backbone.root))
                if layer is None:
                    layer = FusionLayer(backbone, adapter_name, fusion)
                    setattr(backbone.root, LAYER_NAME, layer)
                    if backbone is backbones[0] and not layers:
                        layer.taps.accept_states(model, replaying)  # peft calls a model without task type past our forward
                else:
                    layer.update(adapter_name, fusion=fusion)
                fusion.requires_grad_(False)
            for layer in fusion_layers(model):
                if adapter_name in self.active_adapters:
                    layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                check_layer_drop(layer)
            if weights is not None:
                check_wrapped_tensors(model, adapter_name, weights)
        config.source = None  # checked: a copy of the config stands for another adapter, and the folder may go
        for layer in fusion_layers(model):
            layer.train(layer.training)

    def forward(self, *args: Any, layer_states: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Calls the model; with `layer_states` (see `fusion_adapters.features`) the blocks do not run.

        Args:
            *args: What the model is called with.
            layer_states: `states` `(N, tokens, d)` of the layers that the fusion reads, and `z_L` last; `positions`
                `(tokens,)` of each token in the padded batch; `layers`, their numbers; `kept`, `"all"` or which
                positions are there (see `CachedDataset`); and maybe `adapters`, see `adapters_in_use`.
            **kwargs: As `args`.

        Raises:
            ValueError: If the states do not fit the fusion, or something trains inside the backbone.
        """
        if layer_states is None:
            return super().forward(*args, **kwargs)
        with replaying(self.model, layer_states):
            return super().forward(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it was active, the first of those that are left becomes active."""
        super().delete_adapter(adapter_name)
        left = sorted({name for layer in fusion_layers(self.model) for name in layer.fusions})
        # peft asks the first LoRA layer who is left, which knows nothing of adapters without LoRA
        if left and not self.active_adapters:
            self.set_adapter(left[0])

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (several adapters in one batch) does not work with a fusion, which replaces the output of "
                "the last block for the whole batch. Run one batch per adapter, with model.set_adapter in between."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        drop_fusion: bool = False,
    ) -> nn.Module:
        """Folds LoRA into the backbone and takes the adapters off it.

        Args:
            progressbar: See `peft.LoraModel.merge_and_unload`.
            safe_merge: See there.
            adapter_names: See there.
            drop_fusion: Confirms that the fusion, which cannot be folded into any weight, is lost.

        Raises:
            ValueError: If a fusion with parameters would be lost and `drop_fusion` is not set.
        """
        lost = sum(p.numel() for layer in fusion_layers(self.model) for p in layer.fusions.parameters())
        if lost and not drop_fusion:
            raise ValueError(
                f"A fusion of {lost:,} parameters cannot be folded into the backbone's weights and would be lost. To "
                "fold in LoRA and keep the fusion, call model.merge_adapter(). To lose the fusion, call "
                "model.merge_and_unload(drop_fusion=True)."
            )
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of fusions is not a fusion.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "add_weighted_adapter combines LoRA matrices, and there is no such sum for fusions, whose weights enter through "
            "norms and a softmax. Train one adapter on the joint data, or switch between adapters with model.set_adapter."
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for layer in fusion_layers(self.model):
            layer.taps.remove()
            delattr(layer.backbone.root, LAYER_NAME)
        for wrapper in (m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)):
            dtype = next((p.dtype for p in wrapper.original_module.parameters()), None)
            for head in wrapper.modules_to_save.values():
                remove_float32_hook(head)
                head.to(dtype)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        with _as_lora(peft_config):
            super()._check_target_module_compatiblity(peft_config, model, target_name)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, output_state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        # PiSSA and its like: peft prepares the initial adapter for its own type of LoRA, and carries nothing but LoRA over
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        converted = super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, output_state_dict, kwargs)
        return {**{k: v for k, v in output_state_dict.items() if "lora_" not in k}, **converted}

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # Every save passes here, with the PeftModel. Trainer.push_to_hub writes the card anew after saving, by peft's
        # method; this instance's then adds our section again.
        if isinstance(model, PeftModel) and not isinstance(model.create_or_update_model_card, _Card):
            model.create_or_update_model_card = _Card(model)  # type: ignore[method-assign]
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # Every load passes here (peft itself ignores what does not fit); wrapped modules have their model keys already.
        model_state = model.state_dict()
        expected = get_peft_model_state_dict(
            model, state_dict=model_state, adapter_name=adapter_name, save_embedding_layers=False
        )
        file_keys = {model_key: file_key for file_key, model_key in wrapped_keys(model, adapter_name).items()}
        given = {file_keys.get(k, k): v for k, v in state_dict.items()}
        given = {k: v for k, v in given.items() if k in expected or k not in model_state}
        # transformers' own load has no prefix in the model, but the file has
        if not any(k.startswith(MODEL_PREFIX) for k in expected):
            given = {k.removeprefix(MODEL_PREFIX): v for k, v in given.items()}
        given = without_embeddings(model, given, expected)
        compare_tensors(expected, given)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


class _Card:
    """Writes the model card of one PeftModel by peft's own method, and adds how the adapter is loaded."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, output_dir: str) -> None:
        type(self.model).create_or_update_model_card(self.model, output_dir)
        add_loading_section(output_dir, self.model.active_peft_config)


def _fusion_for(backbone: Backbone, config: FusionConfig) -> Fusion:
    fusion = build_fusion(
        config.fusion,
        backbone.hidden_size,
        backbone.num_layers,
        config.fusion_layers,
        last_block=_plain_copy(backbone.blocks[-1]) if config.fusion_copy_last else None,
        **config.options,
    )
    fusion.stop_gradient = config.fusion_stop_gradient
    return fusion


def _plain_copy(block: nn.Module) -> nn.Module:
    """A copy of a block without hooks and without tuner layers."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(getattr(m, name)): OrderedDict() for m in block.modules() for name in hooks}
    clone = copy.deepcopy(block, memo)
    for name, module in list(clone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(clone.get_submodule(parent), child, module.get_base_layer())
    return clone


@contextlib.contextmanager
def _marked_lora_free(config: FusionConfig) -> Iterator[None]:
    """For the time of an injection, says "no LoRA" in peft's way; None would let peft choose modules."""
    if config.has_lora:
        yield
        return
    config.target_modules = DUMMY_TARGET_MODULES
    try:
        yield
    finally:
        config.target_modules = None


@contextlib.contextmanager
def _as_lora(config: Any) -> Iterator[None]:
    """In the body, the config's type is LoRA's, for what peft does by the type."""
    own, config.peft_type = config.peft_type, PeftType.LORA
    try:
        yield
    finally:
        config.peft_type = own


@contextlib.contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """Puts the module tree back as it was if the body fails: children, parameters, what trains, who is active."""
    modules = list(model.modules())
    contents: list[dict[str, Any]] = [d for m in modules for d in (m._modules, m._parameters)]
    before = [dict(d) for d in contents]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    adapters = [(m._adapters, set(m._adapters)) for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]
    active = [(m, m._active_adapter) for m in modules if isinstance(m, (AuxiliaryTrainingWrapper, BaseTunerLayer))]
    layers = fusion_layers(model)
    try:
        yield
    except BaseException:
        for attached in fusion_layers(model):
            if not any(attached is layer for layer in layers):
                attached.taps.remove()
        for now, then in zip(contents, before, strict=True):
            now.clear()
            now.update(then)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)
        for names, names_before in adapters:
            names.clear()
            names.update(names_before)
        for module, adapter in active:
            module._active_adapter = adapter
        raise
