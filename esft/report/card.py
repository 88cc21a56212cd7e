"""The card of a run: what was trained on what, how, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from esft.recipe_sections import TrainSpec
from esft.trained_parts import TrainedParts

if TYPE_CHECKING:
    from esft.recipe_sections import Recipe
    from esft.run.result import RunResult
    from esft.selection import Selection

_CARD = """\
# {{ recipe.model }}, specialised by {{ result.method }}

| | |
|---|---|
| base | `{{ recipe.model }}` |
| method | {{ result.method }} |
| training data | `{{ recipe.data.sources("train") | map(attribute="path") | join("`, `") }}` |
| steps | {{ result.steps }}{% if result.best_step %}, the weights are those of step \
{{ result.best_step }}{% endif %} |
{% if every_expert -%}
| experts | all |
{% endif -%}
{% if parts -%}
| also trained | {{ parts | join(", ") }} |
{% endif -%}
{% if result.train_loss is not none -%}
| training loss (mean over the steps) | {{ "%.4f" % result.train_loss }} |
{% endif -%}
| parameters trained | {{ "{:,}".format(result.trained) }} \
({{ "%.1f" % (100 * result.trained / result.total) }} % of the model) |
{% if result.moved -%}
| moved while training | {{ "%.1f" % (100 * result.moved.share) }} % of them |
{% endif -%}
{% if result.stored_moved -%}
| moved as the base stores them | {{ "%.1f" % (100 * result.stored_moved.share) }} % |
{% endif -%}
{% if result.drift -%}
| the selected experts' share of gate scores | {{ "%.3f" % result.drift.before }} before, \
{{ "%.3f" % result.drift.after }} after (mean of the layers, \
{{ "{:,}".format(result.drift.tokens) }} tokens) |
{% endif -%}
| size of the delta | {{ "{:,}".format(result.delta_bytes) }} bytes |
{% if result.evaluation -%}
| exact match on {% if recipe.data.eval_rows %}{{ recipe.data.eval_rows }} training rows set aside\
{% else %}`{{ recipe.data.sources("eval") | map(attribute="path") | join("`, `") }}`{% endif %} \
| {{ "%.3f" % result.evaluation.exact_match }} |
| loss there | {{ "%.4f" % result.evaluation.loss }} |
{% endif %}
{% if selection and not every_expert -%}
Experts trained, by layer, best first:

| layer | experts |
|---|---|
{% for layer, ids in selection.experts.items() -%}
| {{ layer }} | {{ ids | join(", ") }} |
{% endfor %}
{% endif -%}
`recipe.yaml` states the whole run; `metrics.jsonl` has what was logged. To get an ordinary
checkpoint:

    esft merge {{ recipe.model }} {{ result.delta }} --out MERGED
"""


def run_card(recipe: Recipe, result: RunResult, selection: Selection | None) -> str:
    """Return the card of a run as Markdown."""
    train = recipe.train or TrainSpec()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(_CARD).render(
        recipe=recipe,
        result=result,
        selection=selection,
        every_expert=train.experts == "all",
        parts=TrainedParts.of(selection, **train.parts).names,
    )
