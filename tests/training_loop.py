"""A plain training loop, so that tests of attaching and merging do not depend on `esft.train`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def batches(steps: int, vocab: int = 64, shape: tuple[int, int] = (2, 24)) -> list[torch.Tensor]:
    """Return seeded random token ids, one `[2, 24]` batch a step."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, shape, generator=generator) for _ in range(steps)]


def train_steps(model: PreTrainedModel, steps: int, lr: float = 1e-2) -> list[float]:
    """Train everything that requires a gradient with AdamW; return the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    few = batches(2)  # seen again and again, so that the loss must fall
    for step in range(steps):
        ids = few[step % len(few)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
