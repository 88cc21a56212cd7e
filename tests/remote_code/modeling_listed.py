"""A model as a checkpoint may bring its own: experts as a list of modules, called one by one.

The weights and their names are those of transformers' DeepSeek-V2, where experts are stacked. It
is copied beside a checkpoint by `tests.remote`, and has to stand alone.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM


class ListedConfig(DeepseekV2Config):
    """DeepSeek-V2's, and whether a token's gates are made to sum to 1."""

    model_type = "listed_moe"

    def __init__(self, norm_topk_prob=False, **options):
        super().__init__(**options)
        self.norm_topk_prob = norm_topk_prob


class ListedGate(nn.Module):
    """Chooses the K experts with the highest probability."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden):
        """Return the ids and weights of K experts a token, and a loss that is not there."""
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        weight, index = F.linear(rows, self.weight.float()).softmax(-1).topk(self.top_k)
        if self.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        else:
            weight = weight * self.routed_scaling_factor
        return index, weight, None


class ListedExpert(nn.Module):
    """One expert."""

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        """Compute a SwiGLU."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListedBlock(nn.Module):
    """Sums the chosen experts and the shared ones."""

    def __init__(self, config, shared):
        super().__init__()
        self.gate = ListedGate(config)
        self.experts = nn.ModuleList(ListedExpert(config) for _ in range(config.n_routed_experts))
        self.shared_experts = shared

    def forward(self, hidden):
        """Run each expert on its tokens."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        index, weight, _ = self.gate(hidden)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(index == number)
            gates = weight[token, choice, None].to(rows.dtype)
            out = out.index_add(0, token, expert(rows[token]) * gates)
        return out.view_as(hidden) + self.shared_experts(hidden)


class ListedForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V2 with such blocks."""

    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            layer.mlp = ListedBlock(config, layer.mlp.shared_experts)
        self.post_init()
