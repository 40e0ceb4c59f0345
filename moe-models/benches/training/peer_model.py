"""The models of `models.rs` in PyTorch, around any MoE layer."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peer_experts import Mlp


@dataclass
class Model:
    """What `models.rs` says of a model, and the type that products read."""

    name: str
    vocab_size: int
    seq_len: int
    batch: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    init_std: float
    num_experts: list[int]
    expert_interval: int
    residual: bool
    aux_loss_coef: float
    dtype: torch.dtype


class Dense(Mlp):
    def forward(self, x):
        return super().forward(x), None


class Block(nn.Module):
    def __init__(self, model, feed_forward):
        super().__init__()
        d_model, self.num_heads = model.d_model, model.num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.feed_forward = feed_forward

    def attend(self, x):
        batch, length, d_model = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, d_model))

    def forward(self, x):
        x = x + self.attend(self.attention_norm(x))
        hidden, aux_loss = self.feed_forward(self.mlp_norm(x))
        return x + hidden, aux_loss


class Gpt(nn.Module):
    """A decoder with MoE layers made by `moe_layer(model, num_experts)`; its output is tied to its embedding."""

    def __init__(self, model, moe_layer):
        super().__init__()
        self.aux_loss_coef = model.aux_loss_coef
        self.tokens = nn.Embedding(model.vocab_size, model.d_model)
        self.positions = nn.Embedding(model.seq_len, model.d_model)
        experts = iter(model.num_experts)
        is_moe = [(layer + 1) % model.expert_interval == 0 for layer in range(model.num_layers)]
        layers = (moe_layer(model, next(experts)) if moe else Dense(model) for moe in is_moe)
        self.blocks = nn.ModuleList(Block(model, layer) for layer in layers)
        self.norm = nn.LayerNorm(model.d_model)
        self.start(model)

    def start(self, model):
        """Our initial weights; the gate and the residual network's coefficient keep PyTorch's, which are ours too."""
        for name, parameter in self.named_parameters():
            if "gate" in name or "coefficient" in name:
                continue
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
            else:
                into_residual = ".out." in name or "fc_out" in name
                nn.init.normal_(
                    parameter, std=model.init_std / math.sqrt(2 * model.num_layers) if into_residual else model.init_std
                )
        # As in models.rs: otherwise an untrained gate prefers a few experts.
        nn.init.normal_(self.positions.weight, std=1.0)

    def loss(self, input_ids, target_ids):
        x = self.tokens(input_ids) + self.positions.weight
        total = 0.0
        for block in self.blocks:
            x, aux_loss = block(x)
            if aux_loss is not None:
                total = total + self.aux_loss_coef * aux_loss
        logits = F.linear(self.norm(x), self.tokens.weight).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target_ids.view(-1)) + total
