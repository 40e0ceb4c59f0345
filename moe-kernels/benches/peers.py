"""The work of `kernels.rs` by PyTorch on the CPU: one JSON line per shape, number of tokens and method.

Same shapes, routing anew for each call, several layers cycled, expert ids and weights given. Needs torch 2.15 or later
(`torch._grouped_mm` is not a public name). Run by `cargo xtask bench kernels --peers VENV`.
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

# name, d_model, d_ff, experts, top_k, gated, layers
SHAPES = [
    ("gpt32", 1024, 4096, 32, 1, False, 2),
    ("gpt128", 1024, 4096, 128, 1, False, 1),
    ("olmoe", 2048, 1024, 64, 8, True, 2),
    ("mixsmall", 1024, 3584, 8, 2, True, 6),
]
TOKENS = [1, 4, 32, 512, 2048]


def activate(hidden, gated):
    if not gated:
        return F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def combine(tokens, rows, order, weights, out):
    """Adds each row, scaled by its weight, to its token."""
    out.index_add_(0, order // weights.shape[1], rows * weights.reshape(-1, 1)[order])
    return out


def loop(x, fc_in, fc_out, ids, weights, gated):
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        rows = activate(x[token] @ fc_in[expert].t(), gated) @ fc_out[expert].t()
        out.index_add_(0, token, rows * weights[token, choice].unsqueeze(1))
    return out


def grouped_mm(x, fc_in, fc_out, ids, weights, gated):
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=fc_in.shape[0]).cumsum(0).to(torch.int32)
    rows = x[order // ids.shape[1]]
    hidden = activate(torch._grouped_mm(rows, fc_in.transpose(-2, -1), offs=ends), gated)
    rows = torch._grouped_mm(hidden, fc_out.transpose(-2, -1), offs=ends)
    return combine(x, rows, order, weights, torch.zeros_like(x))


def measure(method, layers, shape, tokens):
    _, d_model, _, experts, top_k, gated, _ = shape
    x = torch.randn(tokens, d_model).to(torch.bfloat16)
    weights = torch.full((tokens, top_k), 1.0 / top_k, dtype=torch.bfloat16)
    calls = 24 if tokens <= 32 else 6
    per_expert, touched = [], 0
    for call in range(calls + 2):
        ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
        fc_in, fc_out = layers[call % len(layers)]
        start = time.perf_counter()
        method(x, fc_in, fc_out, ids, weights, gated)
        seconds = time.perf_counter() - start
        if call >= 2:
            used = ids.unique().numel()
            per_expert.append(seconds / used)
            touched += used
    # As in kernels.rs: routing varies, so the median is of the time per expert touched.
    return statistics.median(per_expert) * touched / calls


def main():
    only = sys.argv[1:]
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in SHAPES:
            name, d_model, d_ff, experts, _, gated, count = shape
            if only and name not in only:
                continue
            width = d_ff * (2 if gated else 1)
            layers = [
                (
                    torch.full((experts, width, d_model), 1e-3, dtype=torch.bfloat16),
                    torch.full((experts, d_model, d_ff), 1e-3, dtype=torch.bfloat16),
                )
                for _ in range(count)
            ]
            for tokens in TOKENS:
                for label, method in [("torch-loop", loop), ("torch-grouped_mm", grouped_mm)]:
                    seconds = measure(method, layers, shape, tokens)
                    row = {"peer": label, "shape": name, "type": "bf16", "tokens": tokens, "seconds": seconds}
                    print(json.dumps(row), flush=True)
            del layers


print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
main()
