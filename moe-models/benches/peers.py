"""The training step of `training.rs` by other programs on the CPU: one JSON line per program.

The same model (tied output, learned positions, biases, top-1 experts, load-balance loss) and the same step: bf16
autocast over f32 weights, AdamW, random tokens. PyTorch (2.15 or later: `torch._grouped_mm` is not a public name) keeps
every token; DeepSpeed's layer runs with capacity factor 1.25 and without drops, if the environment has it. Three things
favour these programs: they neither clip gradients nor look for ones that are not finite, and the experts of
`torch-grouped` have no biases (the product takes none). Run by `cargo xtask bench training --peers VENV`.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

# The report alone goes to standard output: libraries log there too.
REPORT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

LAYERS, D_MODEL, HEADS, D_FF = 8, 512, 8, 2048
EXPERTS, EXPERT_INTERVAL, CAPACITY_FACTOR, AUX_LOSS_COEF = 16, 2, 1.25, 0.01
VOCAB, SEQ_LEN, BATCH = 8192, 256, 8
LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1


def keep_freed_memory():
    """As our trainer's allocator does. glibc gives large buffers back to the kernel and has them faulted in anew."""
    trim_threshold, mmap_max = -1, -4
    try:
        libc = ctypes.CDLL(None)
        return libc.mallopt(mmap_max, 0) == 1 and libc.mallopt(trim_threshold, 2**31 - 1) == 1
    except (AttributeError, OSError):
        return False


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_in = nn.Linear(D_MODEL, D_FF)
        self.fc_out = nn.Linear(D_FF, D_MODEL)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))


class TopOne(nn.Module):
    """Router in f32: each token's expert and factor, and the load-balance loss."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D_MODEL, EXPERTS, bias=False)

    def forward(self, tokens):
        with torch.autocast("cpu", enabled=False):
            probs = F.linear(tokens.float(), self.gate.weight).softmax(dim=1)
        factor, expert = probs.max(dim=1)
        load = torch.bincount(expert, minlength=EXPERTS)
        return factor, expert, load, EXPERTS * (probs.mean(dim=0) * load / len(tokens)).sum()


class SortedExperts(nn.Module):
    """Tokens in the order of their experts, `experts(rows, load)`, and back."""

    def __init__(self):
        super().__init__()
        self.router = TopOne()

    def forward(self, x):
        tokens = x.reshape(-1, D_MODEL)
        factor, expert, load, aux_loss = self.router(tokens)
        order = expert.argsort(stable=True)
        rows = self.experts(tokens.to(torch.bfloat16).index_select(0, order), load)
        back = rows.index_select(0, order.argsort())
        return (back * factor.unsqueeze(1)).view(x.shape), aux_loss


class Grouped(SortedExperts):
    def __init__(self):
        super().__init__()
        self.fc_in = nn.Parameter(torch.empty(EXPERTS, D_FF, D_MODEL))
        self.fc_out = nn.Parameter(torch.empty(EXPERTS, D_MODEL, D_FF))

    def experts(self, rows, load):
        ends = load.cumsum(0).to(torch.int32)
        fc_in, fc_out = (w.to(torch.bfloat16).transpose(-2, -1) for w in (self.fc_in, self.fc_out))
        hidden = F.gelu(torch._grouped_mm(rows, fc_in, offs=ends), approximate="tanh")
        return torch._grouped_mm(hidden, fc_out, offs=ends)


class Loop(SortedExperts):
    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def experts(self, rows, load):
        parts = rows.split(load.tolist())
        return torch.cat([mlp(part) for mlp, part in zip(self.mlps, parts) if len(part)])


def deepspeed_layer(drop_tokens):
    """`deepspeed.moe.layer.MoE` with the paper's top-1 gate on one process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It builds an operation with the ninja of its environment.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    for name, value in [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")]:
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29518")
    import deepspeed
    from deepspeed.moe.layer import MoE

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        deepspeed.comm.init_distributed("gloo")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(
                D_MODEL, Mlp(), num_experts=EXPERTS, k=1, capacity_factor=CAPACITY_FACTOR, drop_tokens=drop_tokens
            )

        def forward(self, x):
            hidden, aux_loss, self.load = self.moe(x)
            return hidden, aux_loss

    return Layer()


class Dense(Mlp):
    def forward(self, x):
        return super().forward(x), None


class Block(nn.Module):
    def __init__(self, feed_forward):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.qkv, self.out = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.feed_forward = feed_forward

    def attend(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, HEADS, D_MODEL // HEADS).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, D_MODEL))

    def forward(self, x):
        x = x + self.attend(self.attention_norm(x))
        hidden, aux_loss = self.feed_forward(self.mlp_norm(x))
        return x + hidden, aux_loss


class Gpt(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(SEQ_LEN, D_MODEL)
        is_moe = [(layer + 1) % EXPERT_INTERVAL == 0 for layer in range(LAYERS)]
        self.blocks = nn.ModuleList(Block(experts() if moe else Dense()) for moe in is_moe)
        self.norm = nn.LayerNorm(D_MODEL)
        self.start()

    def start(self):
        """Our initial weights; the gate keeps PyTorch's, which are ours too."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
            elif "gate" not in name:
                into_residual = ".out." in name or "fc_out" in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if into_residual else 0.02)
        # As in training.rs: otherwise an untrained gate prefers a few experts.
        nn.init.normal_(self.positions.weight, std=1.0)

    def loss(self, input_ids, target_ids):
        x = self.tokens(input_ids) + self.positions.weight
        total = 0.0
        for block in self.blocks:
            x, aux_loss = block(x)
            if aux_loss is not None:
                total = total + AUX_LOSS_COEF * aux_loss
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.float().view(-1, VOCAB), target_ids.view(-1)) + total


def adamw(model):
    decays = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    try:
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True), "fused"
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=True), "foreach"


def measure(model, optimizer, steps):
    """Seconds of forward, backward, optimizer and the whole of each step, after one that does not count."""
    times = []
    for step in range(steps + 1):
        input_ids, target_ids = torch.randint(VOCAB, (2, BATCH, SEQ_LEN)).unbind(0)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(input_ids, target_ids)
        value = loss.item()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        if step == 0:
            # Random weights on random tokens know nothing; the auxiliary losses add a few hundredths.
            assert abs(value - math.log(VOCAB)) < 0.5, f"an untrained model's loss is {value}"
        else:
            times.append((forward - start, backward - forward, end - backward, end - start))
    return times


def drop_rate(model, router):
    """Share of the tokens that experts over their capacity turned away in the last step."""
    if router == "dropless":
        return 0.0
    tokens = BATCH * SEQ_LEN
    capacity = math.ceil(tokens / EXPERTS * CAPACITY_FACTOR)
    loads = [block.feed_forward.load for block in model.blocks if hasattr(block.feed_forward, "load")]
    return statistics.mean((load - capacity).clamp(min=0).sum().item() / tokens for load in loads)


def run(peer, router, experts, steps):
    model = Gpt(experts)
    optimizer, kind = adamw(model)
    forward, backward, update, whole = zip(*measure(model, optimizer, steps))
    tokens = BATCH * SEQ_LEN
    row = {
        "peer": peer,
        "type": "bf16",
        "router": router,
        "tokens_per_second": tokens / statistics.median(whole),
        "best": tokens / min(whole),
        "step_ms": statistics.median(whole) * 1e3,
        "forward_ms": statistics.median(forward) * 1e3,
        "backward_ms": statistics.median(backward) * 1e3,
        "optimizer_ms": statistics.median(update) * 1e3,
        "optimizer": kind,
        "drop_rate": drop_rate(model, router),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(row), file=REPORT, flush=True)
    del model, optimizer
    gc.collect()


def main():
    parser = argparse.ArgumentParser(description="The training step of training.rs by PyTorch and DeepSpeed.")
    parser.add_argument("--steps", type=int, default=4, help="steps timed, after one that is not")
    parser.add_argument("only", nargs="*", help="only these peers")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    setup = {"torch": torch.__version__, "threads": torch.get_num_threads(), "keeps_freed_memory": keep_freed_memory()}
    peers = [("torch-grouped", "dropless", Grouped), ("torch-loop", "dropless", Loop)]
    try:
        setup["deepspeed"] = importlib.metadata.version("deepspeed")
        peers.append(("deepspeed", "capacity", lambda: deepspeed_layer(True)))
        peers.append(("deepspeed-nodrop", "dropless", lambda: deepspeed_layer(False)))
    except importlib.metadata.PackageNotFoundError:
        pass
    print(json.dumps(setup), file=REPORT, flush=True)
    for peer, router, experts in peers:
        if not arguments.only or peer in arguments.only:
            run(peer, router, experts, arguments.steps)


main()
