"""Sections that the cards of deltas share, as templates."""

from __future__ import annotations

from typing import Any

import jinja2

from esft.report.base_card import cell
from esft.secrets import redact

ESFT = "[Expert-Specialized Fine-Tuning](https://arxiv.org/abs/2407.01906)"
BELONGS = """\
It is no whole model: it belongs to its base, whose every tensor
is known here by its sha256."""
# Needs `base`, `switches` (whether esft.load_delta takes the delta) and `adapter` (of PEFT's).
USE = """\
## Use

With esft; `DELTA` is this folder{% if base.argument == "BASE" %}, \
`BASE` that of the checkpoint {{ base.name | cell }}{% endif %}:

```sh
esft merge {{ base.argument }} DELTA --out MERGED
```

`MERGED` is an ordinary checkpoint, which needs no esft:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MERGED")
tokenizer = AutoTokenizer.from_pretrained("MERGED")
```
{% if switches %}
Without a merge, beside the base's own weights and switched at any time:

```python
import esft
from transformers import AutoModelForCausalLM
{% if base.argument == "tiny-moe" %}
from esft.locating import resolve

model = AutoModelForCausalLM.from_pretrained(resolve("tiny-moe"))
{%- else %}
model = AutoModelForCausalLM.from_pretrained("{{ base.argument }}")
{%- endif %}
esft.load_delta(model, "DELTA", "task")
esft.set_active(model, "task")  # None for the base
```
{% elif adapter %}
Or with PEFT, from the base:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{% if base.argument == "tiny-moe" %}
from esft.locating import resolve

base = AutoModelForCausalLM.from_pretrained(resolve("tiny-moe"))
{%- else %}
base = AutoModelForCausalLM.from_pretrained("{{ base.argument }}")
{%- endif %}
model = PeftModel.from_pretrained(base, "DELTA")
```
{% endif %}
"""
# Needs `settings`: pairs of a name and a value.
TRAINING = """\
## Training

| | |
|---|---|
{% for name, value in settings -%}
| {{ name }} | {{ value | cell }} |
{% endfor %}
"""
# Needs `selection`, or None; `rule` in words; `method`.
EXPERTS = """\
{% if selection -%}
## Experts

Chosen by {{ rule }}; by layer, {{ "by id" if method == "random" else "best first" }}:

| layer | experts |
|---|---|
{% for layer, ids in selection.experts.items() -%}
| {{ layer }} | {{ ids | join(", ") }} |
{% endfor %}
{% endif -%}
"""
# Needs `versions`.
VERSIONS = """\
## Versions

{% for name, version in versions.items() %}{{ name }} {{ version }}\
{{ ", " if not loop.last }}{% endfor %}
"""


def render(template: str, **values: Any) -> str:
    """Return a card: a template filled in, without secrets, with one line break at its end.

    Values are text and no templates; `| cell` makes one fit for a cell of a table.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["cell"] = cell
    return redact(environment.from_string(template).render(**values).rstrip() + "\n")


def front_matter(**metadata: Any) -> str:
    """Return a card's metadata, keys of `huggingface_hub.ModelCardData`, as its first lines."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---"


def rule_words(rule: dict[str, Any]) -> str:
    """Return the rule of a selection in words."""
    # `auto` says at length why p is what it is.
    stated = {name: value for name, value in rule.items() if value is not None and name != "auto"}
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in stated.items())
    return words or "hand"
