"""A model of tensors without content, built from its configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers.initialization import no_init_weights

from esft.loading import auto_class
from esft.locating import trusted
from esft.plans.loops import answer_loops
from esft.plans.pretence import Tracker


def fake_model(config: Any, dtype: torch.dtype, tracker: Tracker, share: float = 0.0) -> Any:
    """Build a model inside `pretending`.

    Args:
        config: of the model.
        dtype: of its weights.
        tracker: what `pretending` yielded.
        share: of the routed rows, what goes to experts that train.

    Raises:
        ModelError: no routed experts are found in it.
    """
    with no_init_weights():
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trusted.get())
    model.tie_weights()  # which is otherwise part of the initialising that is left out
    answer_loops(model, tracker, share)
    return model
