"""Rows, caches of them, and losses and gradients from both."""

import torch

from fusion_adapters.states import cache_layer_states


def rows_of(inputs):
    """The rows of a batch, without padding."""
    rows = []
    for i in range(len(inputs["labels"] if "labels" in inputs else inputs["start_positions"])):
        row = {name: value[i] for name, value in inputs.items()}
        if "attention_mask" in row:
            real = row["attention_mask"].bool()
            row = {n: v[real].tolist() if v.shape == real.shape else v for n, v in row.items()}
        rows.append(row)
    return rows


def pad(rows):
    """Pads to the right: labels with -100, the rest with 0."""
    result = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if name in ("input_ids", "attention_mask") or (name == "labels" and values[0].dim() == 1):
            fill = -100 if name == "labels" else 0
            result[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        else:
            result[name] = torch.stack(values)
    return result


def some_rows(count=12, seed=0):
    """Token rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = 3 + (7 * i) % 11
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [i % 5] * length})
    return rows


def cached(model, rows, folder, **options):
    return cache_layer_states(model, rows, folder, pad, progress=False, **{"dtype": "float32", **options})


def from_cache(cache, rows, **options):
    dataset = cache.dataset(rows, **options)
    return cache.collator(pad)([dataset[i] for i in range(len(rows))])


def loss_and_gradients(model, inputs, seed=3):
    """In training mode, the head's dropout included."""
    model.train()
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_training(model, live, states):
    expected, gradients = loss_and_gradients(model, live)
    loss, found = loss_and_gradients(model, states)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == found.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
