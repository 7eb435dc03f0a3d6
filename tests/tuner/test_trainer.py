"""transformers' Trainer with an attached model: loss falls, the best model comes back, a run can be resumed."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import LORA, attached, tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

WITH_AND_WITHOUT_LORA = pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])


def rows(seed, count=48, length=8):
    """Sequences whose label at a position is the token's number modulo 5: learnable from the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (count, length), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": (ids % 5).tolist()}
    )


def trainer(model, folder, epochs=3, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        dataloader_pin_memory=False,
        seed=3,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(0), eval_dataset=rows(1, count=16))


def losses(run):
    return [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]


@WITH_AND_WITHOUT_LORA
def test_training_lowers_the_loss_and_brings_the_best_model_back(family, lora, tmp_path):
    model = attached(family, **(LORA[family] if lora else {}))
    # the highest loss is asked for, because the loss falls: the best epoch is then an early one, and not the last
    run = trainer(
        model, tmp_path, epochs=4, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    before = run.evaluate()["eval_loss"]
    run.train()
    by_epoch = losses(run)
    best = max(by_epoch)
    assert by_epoch[-1] < before and by_epoch[-1] < best - 1e-2
    assert abs(run.evaluate()["eval_loss"] - best) < 1e-6
    run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    again = trainer(PeftModel.from_pretrained(tiny(family), tmp_path / "final"), tmp_path / "x")
    assert abs(again.evaluate()["eval_loss"] - best) < 1e-6


class Damages(TrainerCallback):
    """Changes one value in each checkpoint once it is saved, and keeps the model as it is then."""

    def on_save(self, args, state, control, model, **kwargs):
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", "adapter_model.safetensors")
        tensors = load_file(path)
        tensors[min(tensors)].view(-1)[0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
        self.state = {name: value.clone() for name, value in model.state_dict().items()}


def test_a_damaged_best_checkpoint_is_told_and_the_trained_model_stays(family, tmp_path):
    model, damages = attached(family, **LORA[family]), Damages()
    run = trainer(model, tmp_path, 2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    run.add_callback(damages)
    with pytest.raises(ValueError, match=r"checkpoint-\d+' are not those that it was saved with"):
        run.train()
    after = model.state_dict()
    assert after.keys() == damages.state.keys()
    assert all(torch.equal(after[name], value) for name, value in damages.state.items())


@WITH_AND_WITHOUT_LORA
def test_a_resumed_run_equals_an_unbroken_one(family, lora, tmp_path):
    fields = LORA[family] if lora else {}
    whole = trainer(attached(family, model=tiny(family, dropout=0.0), **fields), tmp_path / "whole", epochs=2)
    whole.train()
    first_epoch = tmp_path / "whole" / "checkpoint-6"
    resumed = trainer(attached(family, model=tiny(family, dropout=0.0), **fields), tmp_path / "resumed", epochs=2)
    resumed.train(resume_from_checkpoint=str(first_epoch))
    ours, theirs = (load_file(tmp_path / n / "checkpoint-12" / "adapter_model.safetensors") for n in ("whole", "resumed"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@WITH_AND_WITHOUT_LORA
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, lora, reentrant):
    fields = LORA[family] if lora else {}
    gradients = []
    for checkpointing in (False, True):
        model = attached(family, model=tiny(family, dropout=0.0), fusion_layers=[0, 1, -1], **fields)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        ids = torch.arange(1, 19).reshape(2, 9)
        for _ in range(2):  # the second pass has an adapter that is not the identity
            model.zero_grad()
            model(input_ids=ids, labels=ids % 5).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.5 * parameter.grad)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], rtol=1e-5, atol=1e-6)


def test_mixed_precision_training(tmp_path):
    run = trainer(attached("bert"), tmp_path, epochs=3, bf16=True, use_cpu=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert losses(run)[-1] < before
    assert all(p.dtype == torch.float32 for p in run.model.parameters() if p.requires_grad)
