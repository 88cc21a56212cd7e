"""Which part of a rendered conversation the assistant writes."""

from __future__ import annotations

import re
from typing import NamedTuple

from esft.data.chat import Chat
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


class TurnsChangeError(DataError):
    """Prefixes do not lead to the answers."""


def find_answers(chat: Chat) -> Rendering:
    """Render a conversation and find the answers in it, by generation tags or by prefixes.

    Raises:
        TurnsChangeError: there are no tags, and prefixes do not lead to the answers.
        DataError: the template refuses the messages, or leaves out what the assistant says.
    """
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    by = _by_marks if _GENERATION.search(chat.template) else _by_prefixes
    rendering = by(chat, turns)
    _check_said(chat, rendering)
    return rendering


def _by_prefixes(chat: Chat, turns: list[int]) -> Rendering:
    whole = chat.text(len(chat.messages))
    answers: list[Answer] = []
    for i in turns:
        prompt = chat.text(i, prompts=True)
        answered = chat.text(i + 1)
        if not answered.startswith(prompt):
            raise TurnsChangeError(
                f"{chat.where}: the chat template does not begin the answer in `messages[{i}]` the "
                f"way it prompts for one, so the model would learn what it never sees; use "
                f"another template, or `prompt` and `completion`"
            )
        if not whole.startswith(answered) or (answers and len(prompt) < answers[-1].end):
            raise TurnsChangeError(
                f"{chat.where}: the chat template renders the turns up to `messages[{i}]` "
                f"differently once others follow (some drop earlier reasoning); give each answer "
                f"a row of its own, or use another template"
            )
        answers.append(Answer(len(prompt), len(answered), i))
    return Rendering(whole, answers, marked=False)


def _by_marks(chat: Chat, turns: list[int]) -> Rendering:
    """Read the answers from the template's tags, checked against the turns' own places.

    What the prompt for an answer holds already is not the assistant's to write, tagged or not.
    """
    whole, places = chat.marked()
    begins = [
        begin
        for i in turns
        if (begin := _shared(chat, whole, i, prompts=True) or _shared(chat, whole, i)) is not None
    ]
    if len(begins) < len(turns):
        # Turns are rendered otherwise alone: the count alone can tell which tag is whose.
        if len(places) != len(turns):
            raise DataError(
                f"{chat.where}: the chat template has {len(places)} generation tags for "
                f"{len(turns)} answers, and it cannot be told which belongs to which"
            )
        return _merged(whole, [Answer(*place, i) for place, i in zip(places, turns, strict=True)])
    ends = [_shared(chat, whole, i + 1) or len(whole) for i in turns]
    answers = []
    for start, end in places:
        owner = sum(begin < end for begin in begins) - 1
        if owner < 0 or end > ends[owner] or (owner and start < begins[owner - 1]):
            raise DataError(
                f"{chat.where}: the chat template's generation tags mark text that is not the "
                f"assistant's: {whole[start : min(end, start + 40)]!r}; mend the template"
            )
        answers.append(Answer(max(start, begins[owner]), end, turns[owner]))
    return _merged(whole, answers)


def _shared(chat: Chat, whole: str, turns: int, *, prompts: bool = False) -> int | None:
    """Return how long the first turns are as text, if the whole text begins with it."""
    try:
        text = chat.text(turns, prompts=prompts)
    except DataError:  # some templates refuse half a conversation
        return None
    return len(text) if whole.startswith(text) else None


def _merged(whole: str, marked: list[Answer]) -> Rendering:
    """Join tags that touch: a template may mark reasoning, calls and content one by one."""
    answers: list[Answer] = []
    for answer in marked:
        if answers and (answers[-1].end, answers[-1].message) == (answer.start, answer.message):
            answers[-1] = answers[-1]._replace(end=answer.end)
        else:
            answers.append(answer)
    return Rendering(whole, answers, marked=True)


def _check_said(chat: Chat, rendering: Rendering) -> None:
    """Make sure that the template wrote what the assistant says and calls.

    Some take no calls, or no content that is text, and would teach the model to say nothing.
    """
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        parts = [answer for answer in rendering.answers if answer.message == i]
        if not parts:
            raise DataError(
                f"{chat.where}: the chat template's generation tags mark nothing of "
                f"`messages[{i}]`; mend the template"
            )
        written = "".join(rendering.text[part.start : part.end] for part in parts)
        calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
        # Templates trim and move text; the last word of it survives that.
        words = re.findall(r"\w+", message["content"])[-1:]
        for what, name in (*(("tool call", name) for name in calls), *(("end", w) for w in words)):
            if name not in written:
                raise DataError(
                    f"{chat.where}: the chat template leaves the {what} of `messages[{i}]` out "
                    f"({name!r}), so the model would learn not to write it; use another template"
                )
