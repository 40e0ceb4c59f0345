"""MoE layers by PyTorch and DeepSpeed: each takes `x` `[batch, seq, d_model]` and returns it with a load-balance loss."""

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

CAPACITY_FACTOR = 1.25


class Mlp(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.fc_in = nn.Linear(model.d_model, model.d_ff)
        self.fc_out = nn.Linear(model.d_ff, model.d_model)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))


class TopOne(nn.Module):
    """Router in f32: each token's expert and factor, and the load-balance loss."""

    def __init__(self, model, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(model.d_model, num_experts, bias=False)

    def forward(self, tokens):
        with torch.autocast("cpu", enabled=False):
            probs = F.linear(tokens.float(), self.gate.weight).softmax(dim=1)
        factor, expert = probs.max(dim=1)
        load = torch.bincount(expert, minlength=self.num_experts)
        return factor, expert, load, self.num_experts * (probs.mean(dim=0) * load / len(tokens)).sum()


class SortedExperts(nn.Module):
    """Tokens in the order of their experts, `experts(rows, load)`, and back."""

    def __init__(self, model, num_experts):
        super().__init__()
        self.dtype = model.dtype
        self.router = TopOne(model, num_experts)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        factor, expert, load, aux_loss = self.router(tokens)
        order = expert.argsort(stable=True)
        rows = self.experts(tokens.to(self.dtype).index_select(0, order), load)
        back = rows.index_select(0, order.argsort())
        return (back * factor.unsqueeze(1)).view(x.shape), aux_loss


class Grouped(SortedExperts):
    def __init__(self, model, num_experts):
        super().__init__(model, num_experts)
        self.fc_in = nn.Parameter(torch.empty(num_experts, model.d_ff, model.d_model))
        self.fc_out = nn.Parameter(torch.empty(num_experts, model.d_model, model.d_ff))

    def experts(self, rows, load):
        ends = load.cumsum(0).to(torch.int32)
        fc_in, fc_out = (w.to(self.dtype).transpose(-2, -1) for w in (self.fc_in, self.fc_out))
        hidden = F.gelu(torch._grouped_mm(rows, fc_in, offs=ends), approximate="tanh")
        return torch._grouped_mm(hidden, fc_out, offs=ends)


class Loop(SortedExperts):
    def __init__(self, model, num_experts):
        super().__init__(model, num_experts)
        self.mlps = nn.ModuleList(Mlp(model) for _ in range(num_experts))

    def experts(self, rows, load):
        parts = rows.split(load.tolist())
        return torch.cat([mlp(part) for mlp, part in zip(self.mlps, parts) if len(part)])


class Residual(nn.Module):
    """Experts beside a network that sees every token, mixed by a softmax over two, which is taken in f32 as the gate's."""

    def __init__(self, model, experts):
        super().__init__()
        self.experts, self.residual_mlp = experts, Mlp(model)
        self.coefficient = nn.Linear(model.d_model, 2)

    def forward(self, x):
        routed, aux_loss = self.experts(x)
        with torch.autocast("cpu", enabled=False):
            mix = self.coefficient(x.float()).softmax(dim=-1)
        return routed * mix[..., :1] + self.residual_mlp(x) * mix[..., 1:], aux_loss


def torch_layer(experts):
    """A layer of these experts, with the residual network if the model has it."""

    def layer(model, num_experts):
        routed = experts(model, num_experts)
        return Residual(model, routed) if model.residual else routed

    return layer


def start_deepspeed():
    """DeepSpeed on one process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It builds an operation with the ninja of its environment.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    for name, value in [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")]:
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29518")
    import deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed.comm.init_distributed("gloo")


class DeepSpeed(nn.Module):
    """`deepspeed.moe.layer.MoE` with the paper's top-1 gate."""

    def __init__(self, model, num_experts, drop_tokens):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(
            model.d_model,
            Mlp(model),
            num_experts=num_experts,
            k=1,
            capacity_factor=CAPACITY_FACTOR,
            drop_tokens=drop_tokens,
            use_residual=model.residual,
        )

    def forward(self, x):
        hidden, aux_loss, self.load = self.moe(x)
        return hidden, aux_loss


def deepspeed_layer(drop_tokens):
    return lambda model, num_experts: DeepSpeed(model, num_experts, drop_tokens)
