"""A conversation and its chat template, and the text that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esft.data.row import Row
from esft.data.template_bounds import check_length
from esft.errors import DataError


@dataclass(frozen=True, slots=True)
class Chat:
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


def chat_of(row: Row, template: str | None, tokenizer: Any) -> Chat:
    """Return a row's conversation, to be rendered with a template or, if None, the tokenizer's.

    Raises:
        DataError: see `template_for`.
    """
    tools = list(row.tools) or None
    messages = [message.to_dict() for message in row.messages]
    template = template or template_for(tokenizer, tools, row.where)
    return Chat(row.where, messages, tools, tokenizer, template)


def template_for(tokenizer: Any, tools: list[dict[str, Any]] | None, where: str) -> str:
    """Return the template that the tokenizer uses where there are these tools.

    Raises:
        DataError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: messages need a chat template and the tokenizer has none; use `prompt` and "
            f"`completion`, or put a chat_template.jinja beside the model"
        )
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:  # several templates, none of them the default one
        raise DataError(f"{where}: no chat template to choose: {error}") from error
