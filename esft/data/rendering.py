"""Rows of conversations to text, with a chat template and within its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esft.data.answers import Answer, Rendering, TurnsChangeError, find_answers
from esft.data.chat import Chat, chat_of, template_for
from esft.data.row import Row
from esft.data.template_bounds import bounded
from esft.errors import DataError


class Renderer:
    """Renders conversations with a tokenizer's chat template, or TRL's version of it for training.

    Three ways lead to the answers, the first that is open is taken:

    1. The template marks them itself, with `{% generation %}`.
    2. By prefixes, which works for nearly any template: an answer is what the conversation up to
       its turn has beyond the conversation before that turn with the generation prompt.
    3. Where a template begins an answer otherwise than it prompts for one, or renders turns
       otherwise once others follow (Qwen3's drops earlier reasoning), or cannot write a tool call
       (DeepSeek-V3's), and TRL has a training template for this very template: that one, which is
       marked.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        replaced: `file:line` of the rows that TRL's template rendered.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._training: dict[str, str | None] = {}
        self.replaced: list[str] = []

    def render(self, rows: Sequence[Row]) -> list[Rendering | DataError]:
        """Return each conversation as text, or why it cannot be rendered."""
        outcomes = self._render([(row, None) for row in rows])
        again = {
            place: template
            for place, outcome in enumerate(outcomes)
            if _may_help(outcome, rows[place])
            and (template := self._training_template(rows[place])) is not None
        }
        retried = self._render([(rows[place], again[place]) for place in again])
        for place, outcome in zip(again, retried, strict=True):
            if not isinstance(outcome, DataError):
                outcomes[place] = outcome
                self.replaced.append(rows[place].where)
        return outcomes

    def prompt(self, text: str) -> str:
        """Return what a user says, as a prompt for an answer.

        Raises:
            DataError: there is no chat template, or it cannot render the prompt.
        """
        where, messages = "--prompt", [{"role": "user", "content": text}]
        template = template_for(self._tokenizer, None, where)
        chat = Chat(where, messages, None, self._tokenizer, template)
        (outcome,) = bounded(lambda chat: chat.text(1, prompts=True), [chat], lambda c: c.where)
        if isinstance(outcome, DataError):
            raise outcome
        return str(outcome)

    def _render(self, items: list[tuple[Row, str | None]]) -> list[Rendering | DataError]:
        def work(item: tuple[Row, str | None]) -> dict[str, Any]:
            try:
                return {"rendering": find_answers(chat_of(*item, self._tokenizer))}
            except TurnsChangeError as error:
                return {"changes": str(error)}

        outcomes: list[Rendering | DataError] = []
        for outcome in bounded(work, items, lambda item: item[0].where):
            if isinstance(outcome, DataError):
                outcomes.append(outcome)
            elif "changes" in outcome:
                outcomes.append(TurnsChangeError(outcome["changes"]))
            else:
                text, answers, marked = outcome["rendering"]
                outcomes.append(Rendering(text, [Answer(*each) for each in answers], marked))
        return outcomes

    def _training_template(self, row: Row) -> str | None:
        """Return TRL's version of the template that renders a row, if it has one."""
        try:
            stock = template_for(self._tokenizer, list(row.tools) or None, row.where)
        except DataError:
            return None
        if stock not in self._training:
            self._training[stock] = _find_training_template(self._tokenizer, stock, row.where)
        return self._training[stock]


def _may_help(outcome: Rendering | DataError, row: Row) -> bool:
    """Tell whether a training template may render what failed: also calls, as DeepSeek-V3's."""
    calls = any(message.tool_calls for message in row.messages)
    return isinstance(outcome, TurnsChangeError) or (isinstance(outcome, DataError) and calls)


def _find_training_template(tokenizer: Any, stock: str, where: str) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    def find(_: None) -> str | None:
        chosen = dict(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else {}
        if stock != chosen.get("default", stock):
            return None  # TRL looks at the default one only
        try:
            return get_training_chat_template(tokenizer)
        except Exception:  # it has none, or the template failed on the messages it tries
            return None

    # It renders, hence within bounds; whatever stops it, there is no other template then.
    (found,) = bounded(find, [None], lambda _: where)
    return None if isinstance(found, DataError) else found
