"""The training step of `training/main.rs` by other programs on the CPU, one row in a process of its own.

The same models (tied output, learned positions, biases, top-1 experts, load-balance loss) and the same step: f32 weights
whose products read bf16 (autocast) or f32, AdamW, random tokens. PyTorch (2.15 or later: `torch._grouped_mm` is not a
public name) keeps every token, as it is and under `torch.compile` (which needs a C++ compiler); DeepSpeed's layer runs
with capacity factor 1.25 and without drops. Three things favour these programs: they neither clip gradients nor look for
ones that are not finite, and the experts of `torch-grouped` have no biases (the product takes none).

Without arguments it prints the versions and the rows that this environment has, else the measured row, as JSON. Run by
`cargo xtask bench training --peers VENV`.
"""

import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import statistics
import time

import torch

from peer_experts import CAPACITY_FACTOR, Grouped, Loop, deepspeed_layer, start_deepspeed, torch_layer
from peer_model import Gpt, Model

# The report alone goes to standard output: libraries log there too.
REPORT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
COMPILED = "-compile"
PEERS = {
    "torch-loop": ("dropless", torch_layer(Loop)),
    "torch-grouped": ("dropless", torch_layer(Grouped)),
    "torch-loop" + COMPILED: ("dropless", torch_layer(Loop)),
    "torch-grouped" + COMPILED: ("dropless", torch_layer(Grouped)),
    "deepspeed": ("capacity", deepspeed_layer(True)),
    "deepspeed-nodrop": ("dropless", deepspeed_layer(False)),
}
# Compiled code is made anew when the experts' loads are not those that it was made for.
WARM_UP_STEPS, WARM_UP_STEPS_COMPILED = 1, 3


def keep_freed_memory():
    """As our trainer's allocator does. glibc gives large buffers back to the kernel and has them faulted in anew."""
    trim_threshold, mmap_max = -1, -4
    try:
        libc = ctypes.CDLL(None)
        return libc.mallopt(mmap_max, 0) == 1 and libc.mallopt(trim_threshold, 2**31 - 1) == 1
    except (AttributeError, OSError):
        return False


def end_first_without_memory():
    """When memory runs out, the kernel is to end this row, and neither the bench nor others' work."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def memory_mb(field):
    """Memory of this process in units of 10^6 bytes: `VmRSS` now, `VmHWM` at most."""
    with open("/proc/self/status") as file:
        kib = next(line.split()[1] for line in file if line.startswith(field + ":"))
    return int(kib) * 1024 / 1e6


def rows():
    """The rows that this environment has. Compiled ones in bf16 alone: they are the slowest to start."""
    try:
        importlib.metadata.version("deepspeed")
        peers = PEERS
    except importlib.metadata.PackageNotFoundError:
        peers = [peer for peer in PEERS if not peer.startswith("deepspeed")]
    types = lambda peer: ["bf16"] if peer.endswith(COMPILED) else TYPES
    return [{"peer": peer, "type": kind, "router": PEERS[peer][0]} for peer in peers for kind in types(peer)]


def setup():
    versions = {}
    for package in ["torch", "deepspeed"]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions | {"threads": torch.get_num_threads(), "keeps_freed_memory": keep_freed_memory(), "rows": rows()}


def adamw(model):
    decays = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True), "fused"
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=True), "foreach"


def measure(model, loss_of, optimizer, warm_up_steps, steps):
    """Seconds of forward, backward, optimizer and the whole of each step, after some that do not count."""
    times = []
    for step in range(warm_up_steps + steps):
        input_ids, target_ids = torch.randint(model.vocab_size, (2, model.batch, model.seq_len)).unbind(0)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            loss = loss_of(input_ids, target_ids)
        value = loss.item()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        if step == 0:
            # Random weights on random tokens know nothing; the auxiliary losses add a few hundredths.
            known = math.log(model.vocab_size)
            assert abs(value - known) < 0.5, f"an untrained model's loss is {value}, expected about {known}"
        if step >= warm_up_steps:
            times.append((forward - start, backward - forward, end - backward, end - start))
    return times


def drop_rate(gpt, model, router):
    """Share of the tokens that experts over their capacity turned away in the last step."""
    if router == "dropless":
        return 0.0
    tokens = model.batch * model.seq_len
    dropped = []
    for block in gpt.blocks:
        if hasattr(block.feed_forward, "load"):
            load = block.feed_forward.load
            capacity = math.ceil(tokens / len(load) * CAPACITY_FACTOR)
            dropped.append((load - capacity).clamp(min=0).sum().item() / tokens)
    return statistics.mean(dropped)


def run(model, peer, steps):
    router, layer = PEERS[peer]
    if peer.startswith("deepspeed"):
        start_deepspeed()
    imports_mb = memory_mb("VmRSS")
    gpt = Gpt(model, layer)
    optimizer, kind = adamw(gpt)
    is_compiled = peer.endswith(COMPILED)
    loss_of, warm_up = (torch.compile(gpt.loss), WARM_UP_STEPS_COMPILED) if is_compiled else (gpt.loss, WARM_UP_STEPS)
    forward, backward, update, whole = zip(*measure(model, loss_of, optimizer, warm_up, steps))
    tokens = model.batch * model.seq_len
    return {
        "tokens_per_second": tokens / statistics.median(whole),
        "best": tokens / min(whole),
        "step_ms": statistics.median(whole) * 1e3,
        "forward_ms": statistics.median(forward) * 1e3,
        "backward_ms": statistics.median(backward) * 1e3,
        "optimizer_ms": statistics.median(update) * 1e3,
        "optimizer": kind,
        "drop_rate": drop_rate(gpt, model, router),
        "parameters": sum(p.numel() for p in gpt.parameters()),
        "imports_mb": imports_mb,
        "peak_mb": memory_mb("VmHWM"),
    }


def main():
    parser = argparse.ArgumentParser(description="The training step of training/main.rs by PyTorch and DeepSpeed.")
    parser.add_argument("--model", type=json.loads, help="the model, as the bench's lines of JSON have it")
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--type", choices=TYPES, default="bf16", help="what products read")
    parser.add_argument("--steps", type=int, default=4, help="steps timed, after those that warm up")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    if arguments.peer is None:
        report = setup()
    else:
        keep_freed_memory()
        end_first_without_memory()
        try:
            report = run(Model(**arguments.model, dtype=TYPES[arguments.type]), arguments.peer, arguments.steps)
        except Exception as error:
            # Of a compiler's message the first line says enough.
            first_line, _, _ = str(error).strip().partition("\n")
            report = {"failed": f"{type(error).__name__}: {first_line}"}
    print(json.dumps(report), file=REPORT, flush=True)


main()
