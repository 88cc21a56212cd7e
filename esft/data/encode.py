"""Rows to tokens, with a mask that says which of them are the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Any

from esft.data.rows import Row
from esft.errors import DataError, ModelError
from esft.progress import SILENT, Reporter

_CHUNK = 1000  # rows tokenised in one call: enough for the tokenizer to work in bulk


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens.

    Attributes:
        input_ids: the whole row, S token ids.
        completion: S flags: True where the token belongs to an answer, its end token included.
        where: `file:line` of the row.
    """

    input_ids: list[int]
    completion: list[bool]
    where: str

    @property
    def supervised(self) -> int:
        """How many answer tokens a model is asked to predict; nothing predicts the first token."""
        return sum(self.completion[1:])


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Example]:
    """Turn rows into tokens.

    A prompt and its completion are tokenised separately and joined, as they meet when a model
    answers: the prompt with the tokenizer's BOS, if it adds one, the completion with its EOS.
    Conversations go through the tokenizer's chat template; every turn of the assistant is an
    answer. Text that spells a special token becomes that token, as everywhere in transformers.

    Args:
        rows: from `read_rows`.
        tokenizer: a transformers tokenizer.
        max_length: drop rows whose answer ends beyond this many tokens; see `fit`.
        reporter: told about rows that were dropped.

    Raises:
        DataError: a row has no answer token, or the chat template cannot render it, or renders
            an answer otherwise than it would prompt for it, or no row fits into `max_length`;
            the message names file and line.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    examples: list[Example] = []
    watched = reporter if len(rows) > _CHUNK else SILENT
    with watched.task("tokenising", total=len(rows), unit="row") as task:
        for encode, chunk in _chunks(rows):
            encoded = encode(chunk, tokenizer)
            for example in encoded:
                if not example.supervised:
                    raise DataError(f"{example.where}: the answer has no tokens to learn from")
            examples += encoded
            task.advance(len(chunk), tokens=sum(len(example.input_ids) for example in encoded))
    return examples if max_length is None else fit(examples, max_length, reporter=reporter)


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
        return _prompt_ids([prompt], tokenizer)[0]
    text = _render([{"role": "user", "content": prompt}], tokenizer, "--prompt", prompts=True)
    return _ids([text], tokenizer)[0]


def fit(
    examples: Sequence[Example], max_length: int, *, reporter: Reporter = SILENT
) -> list[Example]:
    """Return the examples that fit into `max_length` tokens, in order; answers are never cut.

    An example that is too long only by what follows its last answer is cut; another is dropped.
    Both are counted and reported.

    Raises:
        DataError: not one example fits.
    """
    kept: list[Example] = []
    dropped: list[Example] = []
    cut = 0
    for example in examples:
        if len(example.input_ids) <= max_length:
            kept.append(example)
        elif any(example.completion[max_length:]):
            dropped.append(example)
        else:
            kept.append(shorten(example, max_length))
            cut += 1
    if dropped:
        first = f"{dropped[0].where} with {len(dropped[0].input_ids):,} tokens"
        if not kept:
            raise DataError(
                f"{first}: no row fits into max_length {max_length:,}; raise max_length"
            )
        reporter.note(
            f"{len(dropped):,} of {len(examples):,} rows left out: their answers end beyond "
            f"max_length {max_length:,} (the first: {first})"
        )
    if cut:
        reporter.note(
            f"{cut:,} of {len(examples):,} rows cut to max_length {max_length:,}, after the answer"
        )
    return kept


def shorten(example: Example, length: int) -> Example:
    """Return an example's first `length` tokens."""
    return Example(example.input_ids[:length], example.completion[:length], example.where)


def _chunks(
    rows: Sequence[Row],
) -> Iterator[tuple[Callable[[list[Row], Any], list[Example]], list[Row]]]:
    for form, group in groupby(rows, key=lambda row: row.format):
        while chunk := list(islice(group, _CHUNK)):
            yield (_encode_chats if form == "messages" else _encode_pairs), chunk


def _ids(texts: list[str], tokenizer: Any, *, special: bool = False) -> list[list[int]]:
    # verbose=False: whether a row is too long is decided here, not by the tokenizer's own limit.
    encoded = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


# Prompt and completion


def _encode_pairs(rows: list[Row], tokenizer: Any) -> list[Example]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where an "
            "answer ends; set eos_token in its tokenizer_config.json"
        )
    prompts = _prompt_ids([row.prompt for row in rows], tokenizer)
    completions = _ids([row.completion for row in rows], tokenizer)
    examples = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if not completion:
            raise DataError(f"{row.where}: the answer has no tokens to learn from")
        if completion[-1] != eos:
            completion.append(eos)
        mask = [False] * len(prompt) + [True] * len(completion)
        examples.append(Example(prompt + completion, mask, row.where))
    return examples


def _prompt_ids(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    ids = _ids(prompts, tokenizer, special=True)
    if _adds_eos(tokenizer):  # an answer follows; only its own end is an end
        return [prompt[:-1] for prompt in ids]
    return ids


def _adds_eos(tokenizer: Any) -> bool:
    with_special, without = _ids(["a"], tokenizer, special=True)[0], _ids(["a"], tokenizer)[0]
    eos = tokenizer.eos_token_id
    return eos is not None and with_special[-1] == eos and without[-1:] != [eos]


# Conversations


@dataclass(frozen=True, slots=True)
class _Rendering:
    """A conversation as text.

    Attributes:
        text: the whole.
        cuts: places in `text`, ascending: where the first answer starts, where it ends, where
            the second starts, ...
    """

    text: str
    cuts: list[int]

    def prefixes(self) -> list[str]:
        """The text up to each cut."""
        return [self.text[:cut] for cut in self.cuts]

    def segments(self) -> list[str]:
        """The text between the cuts; those with odd index are answers."""
        edges = [0, *self.cuts, len(self.text)]
        return [self.text[a:b] for a, b in pairwise(edges)]


def _encode_chats(rows: list[Row], tokenizer: Any) -> list[Example]:
    renderings = [_render_row(row, tokenizer) for row in rows]
    # The template wrote the special tokens; the tokenizer must not add its own.
    wholes = _ids([rendering.text for rendering in renderings], tokenizer)
    prefixes = iter(_ids([p for r in renderings for p in r.prefixes()], tokenizer))
    ends = _turn_ends(tokenizer)
    examples = []
    for row, rendering, whole in zip(rows, renderings, wholes, strict=True):
        up_to = list(islice(prefixes, len(rendering.cuts)))
        if all(whole[: len(prefix)] == prefix for prefix in up_to):
            edges = [0, *(len(prefix) for prefix in up_to), len(whole)]
            parts = [whole[a:b] for a, b in pairwise(edges)]
        else:
            # A token spans a cut. A model that answers sees the prompt's tokens end there, so
            # the text is tokenised in parts.
            parts = _ids(rendering.segments(), tokenizer)
        examples.append(_join(parts, row.where, tokenizer, ends))
    return examples


def _join(parts: list[list[int]], where: str, tokenizer: Any, ends: set[int]) -> Example:
    ids: list[int] = []
    mask: list[bool] = []
    for place, part in enumerate(parts):
        answer = _answer_length(part, tokenizer, ends) if place % 2 else 0
        ids += part
        mask += [True] * answer + [False] * (len(part) - answer)
    return Example(ids, mask, where)


def _answer_length(part: list[int], tokenizer: Any, ends: set[int]) -> int:
    """Count the tokens of a rendered answer up to the one that ends the turn.

    Templates put a line break after it, which the model never gets to write.
    """
    length = len(part)
    while length and part[length - 1] not in ends:
        if tokenizer.decode([part[length - 1]]).strip():
            return len(part)
        length -= 1
    return length or len(part)


def _turn_ends(tokenizer: Any) -> set[int]:
    # Which special token ends a turn differs by family and is not always the tokenizer's EOS.
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _render_row(row: Row, tokenizer: Any) -> _Rendering:
    messages = [message.to_dict() for message in row.messages]
    text = _render(messages, tokenizer, row.where)
    cuts: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, row.where, prompts=True)
        answered = _render(messages[: i + 1], tokenizer, row.where)
        if not answered.startswith(prompt):
            raise DataError(
                f"{row.where}: the chat template does not begin the answer in `messages[{i}]` the "
                f"way it prompts for one, so the model would learn what it never sees; use "
                f"another template, or `prompt` and `completion`"
            )
        if not text.startswith(answered) or (cuts and len(prompt) < cuts[-1]):
            raise DataError(
                f"{row.where}: the chat template renders the turns up to `messages[{i}]` "
                f"differently once others follow (some drop earlier reasoning); give each answer "
                f"a row of its own, or use another template"
            )
        cuts += [len(prompt), len(answered)]
    return _Rendering(text, cuts)


def _render(
    messages: list[dict[str, str]], tokenizer: Any, where: str, *, prompts: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: messages need a chat template and the tokenizer has none; use `prompt` and "
            f"`completion`, or put a chat_template.jinja beside the model"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompts
        )
    except Exception as error:  # a template is a program of its author's and may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: the chat template refuses these messages: {reason}") from error
