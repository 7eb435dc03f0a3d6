"""The papers' equations read literally, one token and one layer at a time, in float64. Slow on purpose.

Written from the equations (docs/methods.md), not from the package: it takes the parameters by name and nothing else.
"""

from __future__ import annotations

import math

import torch


def _norm(x, gain, bias, eps=1e-5):
    mean = sum(x.tolist()) / len(x)
    variance = sum((v - mean) ** 2 for v in x.tolist()) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * gain + bias


def _gelu(x):
    return torch.tensor([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()], dtype=torch.float64)


def _elu(x):
    return torch.tensor([v if v > 0 else math.exp(v) - 1 for v in x.tolist()], dtype=torch.float64)


def _softmax(scores):
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def _mlp(p, prefix, n, x):
    """Equation 11: f(x) = W LN(gelu(U x))."""
    hidden = _gelu(p[f"{prefix}.down_weight"][n] @ x + p[f"{prefix}.down_bias"][n])
    normed = _norm(hidden, p[f"{prefix}.norm_weight"][n], p[f"{prefix}.norm_bias"][n])
    return p[f"{prefix}.up_weight"][n] @ normed + p[f"{prefix}.up_bias"][n]


def dwatt_token(p, states, last, heads=1, scaled=False, gain_scale=1.0):
    """Equations 4 to 10 for one token: its N states, each (d,), and its last state. Returns the fused state and weights."""
    size = len(last) // heads
    inner = last + _mlp(p, "query", 0, last)
    query = 1 + _elu(inner)  # equation 5
    keys = [p["key_weight"] @ position for position in p["position"]]  # equation 10
    values = [  # equation 4
        _norm(_mlp(p, "value", n, state), gain_scale * p["value_norm_weight"][n], gain_scale * p["value_norm_bias"][n])
        for n, state in enumerate(states)
    ]
    attended = torch.zeros_like(last)
    weights = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = [float(query[part] @ key[part]) / (math.sqrt(size) if scaled else 1) for key in keys]
        share = _softmax(scores)  # equation 7
        weights.append(share)
        for s, value in zip(share, values, strict=True):
            attended[part] += s * value[part]  # equation 8
    return last + attended, torch.tensor(weights, dtype=torch.float64)  # equation 9


def concat_token(p, states, last, residual):
    """gelu(W [z_1; ..; z_N] + b), or in the residual form z_L + W [..] + b, or with a bottleneck."""
    joined = torch.cat(list(states))
    mixed = p["weight"] @ joined + p["bias"]
    if "up_weight" in p:
        mixed = p["up_weight"] @ _gelu(mixed) + p["up_bias"]
    elif not residual:
        mixed = _gelu(mixed)
    return last + mixed if residual else mixed


def scalar_mix_token(p, states, last, residual):
    """gamma sum_n softmax(w)_n z_n, with or without the last state added."""
    share = _softmax(p["logits"].tolist())
    mixed = sum(s * state for s, state in zip(share, states, strict=True)) * p["gamma"]
    return last + mixed if residual else mixed


def shortcut_token(p, layers, num_layers, states, last):
    """z_L + g * sum_n softmax(w)_n (A_n z_n + b_n - z_L); z_L is cast by the identity, and without maps all states are."""
    share = _softmax(p["logits"].tolist())
    mixed = torch.zeros_like(last)
    for n, (layer, state) in enumerate(zip(layers, states, strict=True)):
        cast = state
        if layer < num_layers and "map_bias" in p:
            matrix = p["map_weight"][n] if "map_weight" in p else p["map_up"][n] @ p["map_down"][n]
            cast = matrix @ state + p["map_bias"][n]
        mixed += share[n] * (cast - last)
    return last + p["gain"] * mixed, torch.tensor(share, dtype=torch.float64)


def attnres_token(p, states, last):
    """sum_n softmax_n(w . RMSNorm(z_n)) z_n, as `z_L + gamma` times it where there is a gamma."""
    scores = []
    for state in states:
        root = math.sqrt(sum(v * v for v in state.tolist()) / len(state) + 1e-6)
        scores.append(float(p["query"] @ (state / root * p["key_norm_weight"])))
    share = _softmax(scores)
    mixed = sum(s * state for s, state in zip(share, states, strict=True))
    fused = last + p["gamma"] * mixed if "gamma" in p else mixed
    return fused, torch.tensor(share, dtype=torch.float64)


def attnpool_text(p, states, last, visible):
    """p_n,t = sum_s softmax_s(w_n . rms(z_n,s)) z_n,s; a = softmax_n(v . rms(p_n,t)); sum_n a_n p_n,t on one sequence (T, d)."""

    def unit(x):
        return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + 1e-8)

    fused, weights = [], []
    for t in range(len(last)):
        seen, pooled = [s for s in range(len(last)) if visible[t][s]], []
        for n, state in enumerate(states):
            share = _softmax([float(p["token_query"][n] @ unit(state[s])) for s in seen])
            pooled.append(sum(a * state[s] for a, s in zip(share, seen, strict=True)))
        share = _softmax([float(p["layer_query"] @ unit(vector)) for vector in pooled])
        mixed = sum(a * vector for a, vector in zip(share, pooled, strict=True))
        fused.append(last[t] + p["gamma"] * mixed if "gamma" in p else mixed)
        weights.append(share)
    return torch.stack(fused), torch.tensor(weights, dtype=torch.float64)


def laya_token(p, states, last, residual, temperature):
    """x_n = W_n z_n + b_n; a = softmax(S gelu(R [x_1; ..; x_N]) / tau); U sum_n a_n x_n + c."""
    narrow = [p["down_weight"][n] @ state + p["down_bias"][n] for n, state in enumerate(states)]
    hidden = _gelu(p["hidden_weight"] @ torch.cat(narrow) + p["hidden_bias"])
    share = _softmax([s / temperature for s in (p["score_weight"] @ hidden + p["score_bias"]).tolist()])
    update = p["up_weight"] @ sum(s * x for s, x in zip(share, narrow, strict=True)) + p["up_bias"]
    return (last + update if residual else update), torch.tensor(share, dtype=torch.float64)


def dwconcat_token(p, states, last, heads):
    """z_L + U gelu(LN(sum_n a_n * W_n x_n + b)) + c with a_n = N softmax_n(q . k_n / sqrt(r / H) + s_n), or 1."""
    plain = torch.ones_like(last)
    normed = [_norm(state, plain, 0 * plain) for state in states]
    width = len(p["down_bias"])
    size = width // heads
    shares = [[1 / len(states)] * len(states)] * heads
    if "query_weight" in p:
        query = p["query_weight"] @ _norm(last, plain, 0 * plain)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = [
                float(query[part] @ p["key"][n][part]) / math.sqrt(size) + float(p["offset"][h][n])
                for n in range(len(states))
            ]
            shares = [*shares[:h], _softmax(scores), *shares[h + 1 :]]
    total = p["down_bias"].clone()
    for n, x in enumerate(normed):
        narrow = p["down_weight"][n] @ x
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            total[part] += len(states) * shares[h][n] * narrow[part]
    hidden = _gelu(_norm(total, p["norm_weight"], p["norm_bias"]))
    return last + p["up_weight"] @ hidden + p["up_bias"], torch.tensor(shares, dtype=torch.float64)


def dwatt_uniform_token(p, states, last, gain_scale):
    """Equations 4, 8 and 9 with the weight 1 / N for every layer."""
    total = torch.zeros_like(last)
    for n, state in enumerate(states):
        gain, bias = gain_scale * p["value_norm_weight"][n], gain_scale * p["value_norm_bias"][n]
        total = total + _norm(_mlp(p, "value", n, state), gain, bias)
    return last + total / len(states)


def mlp_token(p, last):
    """The last state plus equation 11 of it."""
    return last + _mlp(p, "mlp", 0, last)


def encoder_block(p, prefix, x, visible, heads):
    """A pre-norm transformer block on one sequence (T, d); `visible[i][j]` says whether i may attend to j."""
    length, width = x.shape
    size = width // heads
    normed = torch.stack([_norm(v, p[f"{prefix}norm_weight"][0], p[f"{prefix}norm_bias"][0]) for v in x])
    qkv = normed @ p[f"{prefix}qkv_weight"].T + p[f"{prefix}qkv_bias"]
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    attended = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(length):
            seen = [j for j in range(length) if visible[i][j]]
            share = _softmax([float(q[i, part] @ k[j, part]) / math.sqrt(size) for j in seen])
            for s, j in zip(share, seen, strict=True):
                attended[i, part] += s * v[j, part]
    x = x + attended @ p[f"{prefix}out_weight"].T + p[f"{prefix}out_bias"]
    rows = []
    for row in x:
        hidden = _norm(row, p[f"{prefix}norm_weight"][1], p[f"{prefix}norm_bias"][1])
        hidden = _gelu(p[f"{prefix}up_weight"] @ hidden + p[f"{prefix}up_bias"])
        rows.append(row + p[f"{prefix}down_weight"] @ hidden + p[f"{prefix}down_bias"])
    return torch.stack(rows)
