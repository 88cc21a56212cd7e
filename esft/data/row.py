"""One row of a task set, as every format becomes it, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RowFormat = Literal["messages", "prompt-completion", "text", "tokenized"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: what was said; empty where the assistant only calls tools.
        weight: factor of the loss of this turn's tokens, 0 or more; None where the row does not
            say. Of turns of the assistant only.
        tool_calls: `{"type": "function", "function": {"name": ..., "arguments": {...}}}` each.
        more: what else templates read: `name`, `tool_call_id`, `reasoning_content`, `thinking`.
    """

    role: str
    content: str
    weight: float | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content, **self.more}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a task set: a prompt and its answer, a conversation, plain text, or tokens.

    Attributes:
        where: `file:line`, for messages about this row, or `file[row]` where rows have no lines of
            their own; lines count from 1, rows from 0.
        prompt: the text given to the model.
        completion: the text it should answer.
        messages: the turns of a conversation, the last one the assistant's.
        given: how many of the messages, from the first on, are a prompt (a row whose `prompt` and
            `completion` are lists of turns); what the assistant says in them is learnt only with
            `loss_on: assistant`.
        tools: what a conversation's assistant may call: JSON schemas, for the chat template.
        text: all of it is learnt.
        input_ids: S token ids.
        supervised: S flags: which of them are learnt.
        tests: Python code that an answer's code is scored by, see `esft.measures.pass_at_1`.
        setup: Python code that goes in front of the answer's.
    """

    where: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    given: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    input_ids: tuple[int, ...] = ()
    supervised: tuple[bool, ...] = ()
    tests: str = ""
    setup: str = ""

    @property
    def format(self) -> RowFormat:
        """Which of the fields are set."""
        if self.messages:
            return "messages"
        if self.text:
            return "text"
        return "tokenized" if self.input_ids else "prompt-completion"
