"""`esft_kernels` without esft: a layer of eight experts of which two learn, the others stay.

python examples/kernels_alone.py
"""

import torch
from esft_kernels import ExpertBank, Projection, SwiGLU, moe_mlp
from esft_kernels.bank import frozen_ids, slot_map

T, K, E, H, I = 256, 2, 8, 64, 32  # noqa: E741 - tokens, top-k, experts, hidden, inner
selected = [5, 2]
torch.manual_seed(0)


def projection(out: int, width: int) -> Projection:
    """Split random weights of all experts into a trainable and a frozen bank."""
    weight = torch.randn(E, out, width) / width**0.5
    trainable = torch.nn.Parameter(weight[selected])
    return Projection(trainable, weight[frozen_ids(selected, E)])


bank = ExpertBank(projection(2 * I, H), projection(H, I), slot_map(selected, E), SwiGLU())
x, target = torch.randn(T, H), torch.randn(T, H)
topk_weight, topk_index = torch.randn(T, E).softmax(-1).topk(K)

optimizer = torch.optim.AdamW([bank.up.trainable, bank.down.trainable], lr=1e-2)
for step in range(50):
    loss = (moe_mlp(x, topk_index, topk_weight, bank) - target).square().mean()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

trained = sum(p.numel() for p in (bank.up.trainable, bank.down.trainable))
print(f"trained {trained:,} of {E * 3 * H * I:,} weights")
