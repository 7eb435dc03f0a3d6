"""Supervised fine-tuning of a fusion by TRL, with the flags of its command `trl sft` (or a YAML file of them, --config).

`trl sft --use_peft` makes a LoRA; this is its script with another config. The loss is TRL's, the adapter ours.
`python recipes/trl_sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT --fusion concat --fusion_budget 1M`;
on several processes `accelerate launch recipes/trl_sft.py ...`. With --use_peft and TRL's flags of LoRA (--lora_r, ...), there is LoRA in
the backbone beside the fusion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from fusion_adapters import FusionConfig


@dataclass
class FusionArguments:
    """What is fused, and how large it may be."""

    fusion: str = field(default="concat", metadata={"help": "The method."})
    fusion_budget: str = field(default="1M", metadata={"help": "Trainable parameters at most, LoRA's among them."})


def main() -> None:
    """Trains and saves."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, FusionArguments))
    script, training, model, chosen = parser.parse_args_and_config()
    lora = {"r": model.lora_r, "lora_alpha": model.lora_alpha, "lora_dropout": model.lora_dropout} if model.use_peft else {}
    if model.use_peft:
        lora["target_modules"] = model.lora_target_modules
    training.model_init_kwargs = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        **(training.model_init_kwargs or {}),
    }
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    config = FusionConfig(fusion=chosen.fusion, fusion_budget=chosen.fusion_budget, task_type="CAUSAL_LM", **lora)
    trainer = SFTTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
