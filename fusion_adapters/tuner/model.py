"""`FusionModel`: LoRA's tuner with a fusion on top."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_peft_model_state_dict, load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from ..backbone.blocks import LAYER_NAME, find_backbones
from ..backbone.fingerprint import fingerprints, join_fingerprints
from ..backbone.quantization import only_infers
from ..fusions.numerics import undrawn
from .as_lora import as_lora, marked_lora_free
from .binding import bind, check_adapter_name, check_layer_drop, check_saved_names, settle_file, warn_if_compiled
from .budget import settle_budget, size_is_meant, warn_if_large
from .build import build_for
from .card import CardKeeper, CardWriter, class_of
from .config import FusionConfig
from .digest import MODEL_PREFIX, is_wanted, no_digest, weights_digests
from .heads import check_head, name_task_heads, warn_if_nothing_trains
from .headscale import plain_head, prepare_head
from .labels import check_labels, labels_to_save, set_labels
from .layer import FusionLayer, fusion_layers
from .load import Load, current_load
from .lora import choose_targets
from .lower import settle_depth
from .lower_lora import check_nothing_above, without_above
from .offloaded import check_values as check_offloaded
from .offloaded import fill_heads, in_memory, is_offloaded
from .refill import check_same_options
from .replay import checked_states
from .rows import rows_apart
from .shortcut_maps import fill_maps, settle_maps
from .threads import ATTACHING, Calls
from .undo import Before
from .weights import (
    as_held,
    check_weights,
    compare_tensors,
    saved_config,
    tensors_in_file,
    weights_of,
    without_embeddings,
    wrapped_keys,
)


class FusionModel(LoraModel):
    """LoRA's tuner with a fusion on top. Users reach it through `peft.get_peft_model`."""

    tuner_layer_cls = (LoraLayer, FusionLayer)  # type: ignore[assignment]
    calls: Calls  # of the model, whose adapters are switched here

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        known = getattr(model, "peft_config", None)  # peft writes the config into it before it is checked
        kept = dict(known or {})
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            if known is not None:
                known.clear()
                known.update(kept)
            raise

    @property
    def is_quantized(self) -> bool:
        """For `Trainer`, which refuses formats that pass no gradient on. A fusion without LoRA needs none, and counts as not quantised."""
        lora = any(getattr(config, "has_lora", True) for config in self.peft_config.values())
        return bool(getattr(self.model, "is_quantized", False)) and (lora or not only_infers(self.model))

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
        layers = fusion_layers(model)
        self.calls = layers[0].calls or Calls() if layers else Calls()
        load = current_load()
        # in one thread at a time, and calls of the model that begin meanwhile wait
        with ATTACHING, self.calls.switching():
            before = Before(model, adapter_name)
            try:
                self._inject(model, adapter_name, load, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            except BaseException:
                before.restore()
                raise
            finally:
                self.calls.follow(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if load is not None:
            load.before = load.before or before

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        load: Load | None,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        config = self.peft_config[adapter_name]
        assert isinstance(config, FusionConfig)  # peft refuses to mix methods in one model
        if not config.bound:  # what is settled here holds for this model; the caller's config may go to another
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a PeftModel already, and two of them around one model would save each other's weights. Give "
                "get_peft_model the plain model, with FusionConfig's own LoRA fields (r, target_modules) for LoRA and fusion in "
                "one adapter; or fold the LoRA in first, by merge_and_unload(), and save the merged model under a name of its own "
                "(save_pretrained): the adapter then belongs to that, not to the checkpoint before."
            )
        # a config that was read and is attached by itself fills nothing
        filled, (saved, load) = load is not None, saved_config(config, load)
        if config.has_lora:
            choose_targets(config, model)
        meant = size_is_meant(config)
        settle_budget(config, model)
        if config.has_lora:
            with as_lora(config):  # peft renames targets in models that transformers 5 built anew, for LoRA alone
                convert_peft_config_for_transformers(config, model, None)
        backbones = find_backbones(model, config.fusion_blocks, config.fusion_stack)
        layers = {id(layer.backbone.root): layer for layer in fusion_layers(model)}
        if not layers:
            warn_if_compiled(model)
        # those of attached stacks as they were then
        found = [layers[id(b.root)].backbone if id(b.root) in layers else b for b in backbones]
        backbones = settle_depth(config, model, found)
        known = {root: layer.fingerprints.get(backbones[0].depth) for root, layer in layers.items()}
        marks = [fingerprints(b, config.fusion_fingerprint, known.get(id(b.root))) for b in backbones]
        bind(config, backbones, join_fingerprints(marks))
        if load is not None and saved is not None and saved is not config:
            check_same_options(saved, config, backbones[0].num_layers, "the config that was given", load.folder)
        maps = settle_maps(config, backbones, filled)
        name_task_heads(config, model)
        check_labels(config, model)
        check_head(model, backbones, config)
        weights = None if load is None else weights_of(load)
        with init_empty_weights() if low_cpu_mem_usage else undrawn() if filled else contextlib.nullcontext():
            fusions = [build_for(backbone, config) for backbone in backbones]
        fill_maps(fusions[0], maps)
        if not meant:
            warn_if_large(config, fusions)
        there = [fusion for layer in layers.values() for fusion in layer.fusions.values()]
        check_saved_names(config.modules_to_save, [*fusions, *there])
        for backbone, fusion in zip(backbones, fusions, strict=True):
            check_adapter_name(adapter_name, fusion)
            if not any(p.is_meta for p in fusion.parameters()):
                fusion.to(backbone.device)

        with without_above(config, model, backbones), marked_lora_free(config):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            check_nothing_above(backbones, adapter_name)
            fill_heads(model, adapter_name)
            prepare_head(model, backbones, config, adapter_name)
            for backbone, fusion, mark in zip(backbones, fusions, marks, strict=True):
                layer = layers.get(id(backbone.root))
                if layer is None:
                    # one of its layers takes the layer_states that come with a call
                    first = model if backbone is backbones[0] and not layers else None
                    layer = FusionLayer(backbone, adapter_name, fusion, first, checked_states, mark, self.calls)
                    setattr(backbone.root, LAYER_NAME, layer)
                else:
                    layer.add(adapter_name, fusion, backbone, mark)
                fusion.requires_grad_(False)
            for layer in fusion_layers(model):
                if adapter_name in self.active_adapters:
                    layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                check_layer_drop(layer)
            if not low_cpu_mem_usage and is_offloaded(model):
                check_offloaded(model, tensors_in_file(self, adapter_name))
            if load is not None and weights is not None:
                check_weights(model, saved, load, weights, tensors_in_file(self, adapter_name))
        if adapter_name in self.active_adapters:
            warn_if_nothing_trains(model, config)
            set_labels(config, model)
        settle_file(model)
        config.source, config.attached = None, True  # checked: a copy stands for another adapter, and the folder may go
        for layer in fusion_layers(model):
            layer.train(layer.training)

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        with in_memory(target):
            super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Makes an adapter active, and names the outputs as its labels."""
        with self.calls.switching():
            super().set_adapter(adapter_name, *args, **kwargs)
            config: Any = self.peft_config[self.active_adapters[0]]
            set_labels(config, self.model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in fusion_layers(self.model):
            (layer.as_given.discard if autocast_adapter_dtype else layer.as_given.add)(adapter_name)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with self.calls.switching():
            super()._enable_adapter_layers(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it was active, the first of those that are left becomes active."""
        with self.calls.switching():
            super().delete_adapter(adapter_name)
            left = sorted({name for layer in fusion_layers(self.model) for name in layer.fusions})
            # peft asks the first LoRA layer who is left, which knows nothing of adapters without LoRA
            if left and not self.active_adapters:
                self.set_adapter(left[0])

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with self.calls.held(), super()._enable_peft_forward_hooks(*args, **kwargs):  # of a whole generation, too
            if names is None:  # torch compiles no context that may be another
                yield
                return
            with rows_apart(self, names, kwargs):
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
                plain_head(head)
                head.to(dtype)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        with as_lora(peft_config):
            super()._check_target_module_compatiblity(peft_config, model, target_name)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, output_state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        # PiSSA and its like: peft prepares the initial adapter for its own type of LoRA, and carries nothing but LoRA over
        peft_config.init_lora_weights = True
        peft_config.fusion_digest = weights_digests(load_peft_weights(path, device="cpu"))  # its weights stay as they are
        peft_config.save_pretrained(path)
        converted = super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, output_state_dict, kwargs)
        converted = {**{k: v for k, v in output_state_dict.items() if "lora_" not in k}, **converted}
        peft_config.fusion_digest = weights_digests(converted)
        return converted

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        # Every save passes here, before the config is saved, which writes how the model is loaded into the card.
        config.model_class = class_of(model)
        if is_wanted():
            with no_digest():
                whole = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=False)
            config.fusion_digest = weights_digests(whole)
            config.fusion_labels = labels_to_save(config, model)
        # Trainer.push_to_hub writes the card anew after saving, by peft's method; this instance's then adds our section again.
        if isinstance(model, PeftModel) and not isinstance(model.create_or_update_model_card, CardWriter):
            model.create_or_update_model_card = CardWriter(model)  # type: ignore[method-assign]
            model._upload_modified_files = CardKeeper(model)  # type: ignore[method-assign,assignment]
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # Every load passes here, and peft itself ignores what does not fit.
        load = current_load()
        if load is None or not load.compared:
            # wrapped modules have their model keys already
            file_keys = {model_key: file_key for file_key, model_key in wrapped_keys(model, adapter_name).items()}
            given = {file_keys.get(k, k).removeprefix(MODEL_PREFIX): v for k, v in state_dict.items()}
            expected = tensors_in_file(model, adapter_name)
            compare_tensors(expected, without_embeddings(model, given, expected))
        named: Any = {"model": model, "config": config, "adapter_name": adapter_name, "state_dict": state_dict}
        return as_held(model, super()._remap_adapter_state_dict_for_load(**named))
