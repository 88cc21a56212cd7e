"""Rows to tokens, with a mask that says which of them are the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from esft.data.bad_rows import STRICT, BadRows
from esft.data.example import IGNORED, Example, LossOn
from esft.data.rendering import Renderer
from esft.data.row import Row, RowFormat
from esft.data.tokens import end_ids, eos_id, prompt_ids, token_ids
from esft.data.turns import tokenise_chats
from esft.errors import DataError
from esft.progress import SILENT, Reporter

_CHUNK = 1000  # rows tokenised in one call: enough for the tokenizer to work in bulk


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    loss_on: LossOn = "completion",
    last_turn_only: bool = False,
    append_eos: bool = False,
    check_end: bool = True,
    bad_rows: BadRows = STRICT,
    reporter: Reporter = SILENT,
) -> list[Example]:
    """Turn rows into tokens.

    A prompt and its completion are tokenised separately and joined, as they meet when a model
    answers: the prompt with the tokenizer's BOS, if it adds one, the completion with its EOS.
    Conversations go through the tokenizer's chat template; what the assistant writes in its turns,
    end tokens included, is the answer. Text is all answer, and ends with EOS. Text that spells a
    special token becomes that token, as everywhere in transformers.

    Args:
        rows: from `read_rows`.
        tokenizer: a transformers tokenizer.
        loss_on: `completion`: what the assistant writes in the prompt of a conversation (see
            `Row.given`) is no answer; `assistant`: it is, and rows must be conversations;
            `all`: as `completion`, but see `Example.labels`.
        last_turn_only: only the assistant's last turn is an answer.
        append_eos: conversations whose chat template writes no end token get EOS at their end.
        check_end: refuse conversations of which no end token is learnt.
        bad_rows: collects rows that cannot be used, if any may be skipped.
        reporter: told what the chat template made necessary.

    Raises:
        DataError: a row has nothing to learn, or does not teach where an answer ends, or the chat
            template cannot render it, or renders an answer otherwise than it would prompt for it;
            the message names file and line.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    encoder = _Encoder(
        tokenizer,
        loss_on,
        last_turn_only=last_turn_only,
        append_eos=append_eos,
        check_end=check_end,
    )
    examples: list[Example] = []
    watched = reporter if len(rows) > _CHUNK else SILENT
    with watched.task("tokenising", total=len(rows), unit="row") as task:
        for form, chunk in _chunks(rows):
            encoded = []
            for outcome in encoder.encode(form, chunk):
                if isinstance(outcome, DataError):
                    bad_rows.skip(outcome)
                else:
                    encoded.append(outcome)
            examples += encoded
            task.advance(len(chunk), tokens=sum(len(example.input_ids) for example in encoded))
    for note in encoder.notes():
        reporter.note(note)
    return examples


def encode_prompt(prompt: str, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Tokenise a prompt as `encode_rows` does, up to where the answer starts.

    Args:
        prompt: the text; with `chat`, what the user says.
        tokenizer: a transformers tokenizer.
        chat: whether to put the text into the tokenizer's chat template.

    Raises:
        DataError: there is no chat template, or it cannot render the prompt.
    """
    if not chat:
        return prompt_ids([prompt], tokenizer)[0]
    return token_ids([Renderer(tokenizer).prompt(prompt)], tokenizer)[0]


def _chunks(rows: Sequence[Row]) -> Iterator[tuple[RowFormat, list[Row]]]:
    for form, group in groupby(rows, key=lambda row: row.format):
        while chunk := list(islice(group, _CHUNK)):
            yield form, chunk


class _Encoder:
    """Turns rows of any format into tokens, and remembers what there is to say about them."""

    def __init__(self, tokenizer: Any, loss_on: LossOn, **turns: bool) -> None:
        self._tokenizer = tokenizer
        self._loss_on, self._turns = loss_on, turns
        self._renderer = Renderer(tokenizer)
        self._endless: list[str] = []  # rows of tokens that teach no end

    def encode(self, form: RowFormat, rows: list[Row]) -> Iterator[Example | DataError]:
        """Yield each row's tokens, or why it cannot be used."""
        if self._loss_on == "assistant" and form != "messages":
            for row in rows:
                yield DataError(
                    f"{row.where}: loss_on: assistant is for conversations, and this row is "
                    f"{form}; use loss_on: completion"
                )
            return
        encode: dict[RowFormat, Callable[[list[Row]], list[Example | DataError]]] = {
            "prompt-completion": self._pairs,
            "text": self._texts,
            "tokenized": self._tokens,
            "messages": self._chats,
        }
        for row, outcome in zip(rows, encode[form](rows), strict=True):
            yield outcome if isinstance(outcome, DataError) else self._checked(row, outcome)

    def notes(self) -> list[str]:
        """Return what a user should know, a sentence each."""
        said = []
        if rows := self._renderer.replaced:
            said.append(
                f"{_first(rows)}: the tokenizer's chat template renders earlier answers otherwise "
                f"once turns follow, begins answers otherwise than it prompts for them, or cannot "
                f"write calls; TRL's training template is used instead: every answer keeps its "
                f"reasoning (an empty block where it has none), which the tokenizer's own template "
                f"leaves out of later prompts"
            )
        if rows := self._endless:
            said.append(
                f"{_first(rows)}: no end token among the tokens learnt; if these are not parts of "
                f"longer texts, the model will not learn where to stop"
            )
        return said

    def _checked(self, row: Row, example: Example) -> Example | DataError:
        if all(label == IGNORED for label in example.labels(self._loss_on)):
            why = ": the weights are 0" if example.weights is not None else ""
            return DataError(f"{row.where}: the answer has no tokens to learn from{why}")
        return example

    def _pairs(self, rows: list[Row]) -> list[Example | DataError]:
        eos = eos_id(self._tokenizer)
        prompts = prompt_ids([row.prompt for row in rows], self._tokenizer)
        completions = token_ids([row.completion for row in rows], self._tokenizer)
        examples: list[Example | DataError] = []
        for row, prompt, completion in zip(rows, prompts, completions, strict=True):
            if completion and completion[-1] != eos:
                completion.append(eos)
            mask = [False] * len(prompt) + [True] * len(completion)
            examples.append(Example(prompt + completion, mask, row.where))
        return examples

    def _texts(self, rows: list[Row]) -> list[Example | DataError]:
        eos = eos_id(self._tokenizer)
        examples: list[Example | DataError] = []
        texts = token_ids([row.text for row in rows], self._tokenizer, special=True)
        for row, ids in zip(rows, texts, strict=True):
            if ids[-1:] != [eos]:
                ids.append(eos)
            examples.append(Example(ids, [True] * len(ids), row.where))
        return examples

    def _tokens(self, rows: list[Row]) -> list[Example | DataError]:
        known, ends = len(self._tokenizer), end_ids(self._tokenizer)
        examples: list[Example | DataError] = []
        for row in rows:
            strange = next((i for i in row.input_ids if not 0 <= i < known), None)
            if strange is not None:
                examples.append(
                    DataError(
                        f"{row.where}: token {strange:,} is not of this model's tokenizer, which "
                        f"has {known:,}"
                    )
                )
                continue
            if not any(
                flag and token in ends
                for token, flag in zip(row.input_ids, row.supervised, strict=True)
            ):
                self._endless.append(row.where)
            examples.append(Example(list(row.input_ids), list(row.supervised), row.where))
        return examples

    def _chats(self, rows: list[Row]) -> list[Example | DataError]:
        renderings = self._renderer.render(rows)
        encoded = iter(
            tokenise_chats(
                [
                    (row, rendering)
                    for row, rendering in zip(rows, renderings, strict=True)
                    if not isinstance(rendering, DataError)
                ],
                self._tokenizer,
                given=self._loss_on == "assistant",
                **self._turns,
            )
        )
        return [
            rendering if isinstance(rendering, DataError) else next(encoded)
            for rendering in renderings
        ]


def _first(rows: list[str]) -> str:
    return rows[0] if len(rows) == 1 else f"{rows[0]} and {len(rows) - 1:,} more rows"
