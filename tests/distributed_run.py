"""Training runs for test_distributed.py, started by accelerate: losses and scores into a file, the adapter beside it.

Usage: accelerate launch ... distributed_run.py OUTPUT PER_DEVICE_BATCH CASE...
A case is FAMILY-LORA or FAMILY-LORA-checkpointing, and the name of its folder in OUTPUT.
"""

import json
import os
import sys
from pathlib import Path

import torch
from families import attach, inputs
from peft import peft_model
from support import disturb, without_dropout
from support_distributed import end_process
from transformers import Trainer, TrainingArguments

torch.set_num_threads(1)
head = "sequence"


def train(output, size, family, lora, *options):
    """Trains, and writes history and adapter into a folder."""
    rows = [{k: v[i] for k, v in inputs(family, head, seed=seed).items()} for seed in range(8) for i in range(2)]
    model = without_dropout(disturb(attach(family, head, lora == "lora", fusion_alpha=1.0)))

    def noted_save(tensors, path, *args, **kwargs):
        """Writes weights, and notes which process did."""
        (output / f"weights-written-by-{os.environ.get('RANK', '0')}").write_text("")
        save_file(tensors, path, *args, **kwargs)

    peft_model.safe_save_file = noted_save
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output / "run"),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            num_train_epochs=3,
            optim="sgd",  # Adam would make large steps of tiny gradients, and of their rounding
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            train_sampling_strategy="sequential",
            average_tokens_across_devices=False,  # else transformers multiplies this head's loss by the number of processes
            save_strategy="epoch",
            eval_strategy="epoch",
            load_best_model_at_end=True,
            label_names=["labels"],
            gradient_checkpointing="checkpointing" in options,
        ),
        train_dataset=rows,
        eval_dataset=rows[:8],
    )
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        scores = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        (output / "history.json").write_text(
            json.dumps({"losses": losses, "scores": scores, "processes": trainer.accelerator.num_processes})
        )


save_file = peft_model.safe_save_file
for case in sys.argv[3:]:
    folder = Path(sys.argv[1]) / case
    folder.mkdir(parents=True, exist_ok=True)
    train(folder, int(sys.argv[2]), *case.split("-"))
end_process()
