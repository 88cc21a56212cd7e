"""Conversations as text, and which part of it the assistant writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from esft.data.row import Row
from esft.data.template_bounds import bounded, check_length
from esft.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Answer(NamedTuple):
    """What the assistant writes in one turn, or a part of it: `text[start:end]`."""

    start: int
    end: int
    message: int  # its index in the row's messages


class Rendering(NamedTuple):
    """A conversation as text.

    Attributes:
        text: the whole.
        answers: in order; they do not overlap.
        marked: whether the template itself says what the assistant writes.
    """

    text: str
    answers: list[Answer]
    marked: bool


class Renderer:
    """Renders conversations with a tokenizer's chat template, or TRL's version of it for training.

    Three ways lead to the answers, the first that is open is taken:

    1. The template marks them itself, with `{% generation %}`.
    2. By prefixes, which works for nearly any template: an answer is what the conversation up to
       its turn has beyond the conversation before that turn with the generation prompt.
    3. Where a template begins an answer otherwise than it prompts for one, or renders turns
       otherwise once others follow (Qwen3's drops earlier reasoning), and TRL has a training
       template for this very template: that one, which is marked.

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
            if isinstance(outcome, _TurnsChangeError)
            and (template := self._training_template(rows[place])) is not None
        }
        retried = self._render([(rows[place], again[place]) for place in again])
        for place, outcome in zip(again, retried, strict=True):
            outcomes[place] = outcome
            if not isinstance(outcome, DataError):
                self.replaced.append(rows[place].where)
        return outcomes

    def prompt(self, text: str) -> str:
        """Return what a user says, as a prompt for an answer.

        Raises:
            DataError: there is no chat template, or it cannot render the prompt.
        """
        where, messages = "--prompt", [{"role": "user", "content": text}]
        template = _template(self._tokenizer, None, where)
        chat = _Chat(where, messages, None, self._tokenizer, template)
        (outcome,) = bounded(lambda chat: chat.text(1, prompts=True), [chat], lambda c: c.where)
        if isinstance(outcome, DataError):
            raise outcome
        return str(outcome)

    def _render(self, items: list[tuple[Row, str | None]]) -> list[Rendering | DataError]:
        def work(item: tuple[Row, str | None]) -> dict[str, Any]:
            try:
                return {"rendering": _rendering(_chat(*item, self._tokenizer))}
            except _TurnsChangeError as error:
                return {"changes": str(error)}

        outcomes: list[Rendering | DataError] = []
        for outcome in bounded(work, items, lambda item: item[0].where):
            if isinstance(outcome, DataError):
                outcomes.append(outcome)
            elif "changes" in outcome:
                outcomes.append(_TurnsChangeError(outcome["changes"]))
            else:
                text, answers, marked = outcome["rendering"]
                outcomes.append(Rendering(text, [Answer(*each) for each in answers], marked))
        return outcomes

    def _training_template(self, row: Row) -> str | None:
        """Return TRL's version of the template that renders a row, if it has one."""
        stock = _template(self._tokenizer, list(row.tools) or None, row.where)
        if stock not in self._training:
            self._training[stock] = _find_training_template(self._tokenizer, stock, row.where)
        return self._training[stock]


class _TurnsChangeError(DataError):
    """Prefixes do not lead to the answers."""


@dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation and the template to render it with."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    tokenizer: Any
    template: str

    def text(self, turns: int, *, prompts: bool = False) -> str:
        """Return the first turns as text; with `prompts`, up to where an answer would start."""
        try:
            return check_length(
                self.tokenizer.apply_chat_template(
                    self.messages[:turns],
                    tools=self.tools,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompts,
                )
            )
        except MemoryError:  # `bounded` says what it means
            raise
        except Exception as error:  # a template is a program of its author's; it may raise anything
            raise self._refused(error) from error

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole as text, and where in it the template's generation tags begin and end.

        transformers makes its `assistant_masks` of these.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # The call that `apply_chat_template` makes; it keeps the places to itself.
            texts, places = render_jinja_template(
                conversations=[self.messages],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            return check_length(texts[0]), [(start, end) for start, end in places[0] if start < end]
        except MemoryError:
            raise
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> DataError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DataError(f"{self.where}: the chat template refuses these messages: {reason}")


def _chat(row: Row, template: str | None, tokenizer: Any) -> _Chat:
    tools = list(row.tools) or None
    messages = [message.to_dict() for message in row.messages]
    template = template or _template(tokenizer, tools, row.where)
    return _Chat(row.where, messages, tools, tokenizer, template)


def _template(tokenizer: Any, tools: list[dict[str, Any]] | None, where: str) -> str:
    """Return the template that the tokenizer uses for these tools."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: messages need a chat template and the tokenizer has none; use `prompt` and "
            f"`completion`, or put a chat_template.jinja beside the model"
        )
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:  # several templates, none of them the default one
        raise DataError(f"{where}: no chat template to choose: {error}") from error


def _rendering(chat: _Chat) -> Rendering:
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if _GENERATION.search(chat.template):
        return _by_marks(chat, turns)
    return _by_prefixes(chat, turns)


def _by_prefixes(chat: _Chat, turns: list[int]) -> Rendering:
    whole = chat.text(len(chat.messages))
    answers: list[Answer] = []
    for i in turns:
        prompt = chat.text(i, prompts=True)
        answered = chat.text(i + 1)
        if not answered.startswith(prompt):
            raise _TurnsChangeError(
                f"{chat.where}: the chat template does not begin the answer in `messages[{i}]` the "
                f"way it prompts for one, so the model would learn what it never sees; use "
                f"another template, or `prompt` and `completion`"
            )
        if not whole.startswith(answered) or (answers and len(prompt) < answers[-1].end):
            raise _TurnsChangeError(
                f"{chat.where}: the chat template renders the turns up to `messages[{i}]` "
                f"differently once others follow (some drop earlier reasoning); give each answer "
                f"a row of its own, or use another template"
            )
        answers.append(Answer(len(prompt), len(answered), i))
    return Rendering(whole, answers, marked=False)


def _by_marks(chat: _Chat, turns: list[int]) -> Rendering:
    """Read the answers from the template's tags, checked against the turns' own places."""
    whole, places = chat.marked()
    ends = _ends(chat, whole, turns)
    if ends is None:
        # Where turns change once others follow, the count alone can tell which tag is whose.
        if len(places) != len(turns):
            raise DataError(
                f"{chat.where}: the chat template has {len(places)} generation tags for "
                f"{len(turns)} answers, and it cannot be told which belongs to which"
            )
        return _merged(whole, zip(places, turns, strict=True))
    owned = []
    for start, end in places:
        turn = next((k for k, turn_end in enumerate(ends) if end <= turn_end), None)
        if turn is None or start < _begin(chat, whole, turns[turn], ends[turn - 1] if turn else 0):
            raise DataError(
                f"{chat.where}: the chat template's generation tags mark text that is not the "
                f"assistant's: {whole[start : min(end, start + 40)]!r}; mend the template"
            )
        owned.append(((start, end), turns[turn]))
    return _merged(whole, owned)


def _ends(chat: _Chat, whole: str, turns: list[int]) -> list[int] | None:
    """Return where each turn ends in the whole text; None if what follows changes turns."""
    ends = []
    for i in turns:
        text = chat.text(i + 1)
        if not whole.startswith(text):
            return None
        ends.append(len(text))
    return ends


def _begin(chat: _Chat, whole: str, turn: int, at_least: int) -> int:
    """Return where the turns before one end, as far as they can be rendered without it."""
    try:
        before = chat.text(turn)
    except DataError:
        return at_least
    return max(at_least, len(before)) if whole.startswith(before) else at_least


def _merged(whole: str, owned: Any) -> Rendering:
    """Join tags that touch: a template may mark reasoning, calls and content one by one."""
    answers: list[Answer] = []
    for (start, end), message in owned:
        if answers and answers[-1].end == start and answers[-1].message == message:
            answers[-1] = answers[-1]._replace(end=end)
        else:
            answers.append(Answer(start, end, message))
    return Rendering(whole, answers, marked=True)


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
