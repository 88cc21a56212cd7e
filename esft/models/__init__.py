"""Systems of the literature that transformers lacks.

Importing this package makes them known to `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from esft.models.grok1 import Grok1Config, Grok1ForCausalLM, Grok1Model
from esft.models.moeut import MoeutConfig, MoeutForCausalLM, MoeutModel
from esft.models.openmoe import OpenMoeConfig, OpenMoeForCausalLM, OpenMoeModel

__all__ = [
    "MODELS",
    "Grok1Config",
    "Grok1ForCausalLM",
    "Grok1Model",
    "MoeutConfig",
    "MoeutForCausalLM",
    "MoeutModel",
    "OpenMoeConfig",
    "OpenMoeForCausalLM",
    "OpenMoeModel",
]

# Of each: configuration, decoder, language model.
MODELS = (
    (Grok1Config, Grok1Model, Grok1ForCausalLM),
    (OpenMoeConfig, OpenMoeModel, OpenMoeForCausalLM),
    (MoeutConfig, MoeutModel, MoeutForCausalLM),
)

for _config, _model, _language_model in MODELS:
    # `exist_ok`: a later transformers may have a family of that name; a checkpoint of ours is ours.
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _language_model, exist_ok=True)
