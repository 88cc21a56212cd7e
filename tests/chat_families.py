"""Chat templates in the style of six families, and the same conversations written without them.

A family's template is a jinja program for a tokenizer; its writer is a few strings that say what
stands around a turn. Neither knows the other, so that each is a check of the other, and of what is
made of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esft.data.example import Example
from esft.data.row import Message
from tests.toy_tokenizers import byte_tokenizer

Piece = tuple[str, int | None]  # text, and the message whose answer it is


@dataclass(frozen=True)
class Family:
    """How a family writes conversations.

    Attributes:
        special: its special tokens.
        bos: what a conversation begins with, if anything.
        end: ends every turn of the assistant.
        around: role -> what stands before and after its content.
        template: in jinja, with generation tags.
        answer: what the assistant writes before its content.
        tools: before and after the JSON of the tools.
        pad: neither BOS nor `end`.
    """

    special: tuple[str, ...]
    bos: str
    end: str
    around: Mapping[str, tuple[str, str]]
    template: str
    answer: str = ""
    tools: tuple[str, str] = ("", "")
    pad: str = "<|pad|>"

    def tokenizer(self, *, tags: bool, **options: Any) -> Any:
        """Return a byte tokenizer with the template; without `tags`, their names are taken out."""
        template = self.template
        if not tags:
            for tag in ("{% generation %}", "{% endgeneration %}"):
                template = template.replace(tag, "")
        given = {"bos": self.bos or self.pad, "eos": self.end, "pad": self.pad, "adds_bos": False}
        return byte_tokenizer((*self.special, self.pad), template=template, **(given | options))

    def write(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[Piece]:
        """Return a conversation in pieces, each with the index of the message it answers in."""
        pieces: list[Piece] = [(self.bos, None)]
        if tools:
            before, after = self.tools
            pieces.append((before + json.dumps(list(tools)) + after, None))
        for index, message in enumerate(messages):
            before, after = self.around[message.role]
            if message.role == "assistant":
                calls = "".join(
                    f"<call>{json.dumps(call['function'])}</call>" for call in message.tool_calls
                )
                said = self.answer + message.content + calls + self.end
                pieces += [(before, None), (said, index), (after, None)]
            else:
                pieces.append((before + message.content + after, None))
        return pieces


def check(example: Example, pieces: Sequence[Piece], tokenizer: Any, learnt: set[int]) -> None:
    """Make sure that an example's tokens spell the pieces, and flag those of the messages learnt.

    Byte for byte: a token counts as learnt if all its bytes are, and may not be so in part.
    """
    text = b"".join(piece.encode() for piece, _ in pieces)
    flags = [answer in learnt for piece, answer in pieces for _ in piece.encode()]
    place = 0
    for token, flag in zip(example.input_ids, example.completion, strict=True):
        spelt = spelling(token, tokenizer)
        end = place + len(spelt)
        assert text[place:end] == spelt
        assert set(flags[place:end]) == {flag}, (spelt, text[max(0, place - 20) : end + 20])
        place = end
    assert place == len(text)


def spelling(token: int, tokenizer: Any) -> bytes:
    """Return the bytes of one token of a byte tokenizer."""
    if token in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[token]).encode()
    return bytes(_BYTES[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def _byte_letters() -> dict[str, int]:
    """Return which letter stands for which byte in a byte-level vocabulary (GPT-2's choice)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_letters()
_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}"
    "{% endfor %}"
)

CHATML = Family(
    special=("<|im_start|>", "<|im_end|>"),
    bos="",
    end="<|im_end|>",
    around={
        role: (f"<|im_start|>{role}\n", "\n" if role == "assistant" else "<|im_end|>\n")
        for role in ("system", "user", "assistant", "tool")
    },
    tools=("<|im_start|>tools\n", "<|im_end|>\n"),
    template=(
        "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        + _CALLS
        + "{{ '<|im_end|>' }}"
        "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
)
LLAMA3 = Family(
    special=("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    bos="<|begin|>",
    end="<|eot_id|>",
    around={
        role: (
            f"<|start_header_id|>{name}<|end_header_id|>\n\n",
            "" if role == "assistant" else "<|eot_id|>",
        )
        for role, name in {
            "system": "system",
            "user": "user",
            "assistant": "assistant",
            "tool": "ipython",
        }.items()
    },
    tools=("<|start_header_id|>tools<|end_header_id|>\n\n", "<|eot_id|>"),
    template=(
        "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>tools<|end_header_id|>\\n\\n' + "
        "(tools | tojson) + '<|eot_id|>' }}{% endif %}{% for m in messages %}"
        "{% set role = 'ipython' if m.role == 'tool' else m.role %}"
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
        "{% if role == 'assistant' %}{% generation %}{{ m.content }}"
        + _CALLS
        + "{{ '<|eot_id|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
)
MISTRAL = Family(
    special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM]", "[/SYSTEM]", "[RESULT]", "[/RESULT]"),
    bos="<s>",
    end="</s>",
    around={
        "system": ("[SYSTEM]", "[/SYSTEM]"),
        "user": ("[INST]", "[/INST]"),
        "assistant": ("", ""),
        "tool": ("[RESULT]", "[/RESULT]"),
    },
    answer=" ",
    tools=("[TOOLS]", "[/TOOLS]"),
    template=(
        "{{ bos_token }}{% if tools %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}"
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content }}" + _CALLS + ""
        "{{ eos_token }}{% endgeneration %}"
        "{% elif m.role == 'system' %}{{ '[SYSTEM]' + m.content + '[/SYSTEM]' }}"
        "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
        "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
    ),
)
DEEPSEEK = Family(
    special=(
        "<｜begin｜>",
        "<｜end｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜out｜>",
        "<｜out▁end｜>",
    ),
    bos="<｜begin｜>",
    end="<｜end｜>",
    around={
        "system": ("", ""),
        "user": ("<｜User｜>", ""),
        "assistant": ("<｜Assistant｜>", ""),
        "tool": ("<｜out｜>", "<｜out▁end｜>"),
    },
    template=(
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'tool' %}{{ '<｜out｜>' + m.content + '<｜out▁end｜>' }}"
        "{% else %}{{ '<｜Assistant｜>' }}{% generation %}{{ m.content }}" + _CALLS + ""
        "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
)
HARMONY = Family(
    special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    bos="",
    end="<|end|>",
    around={
        role: (f"<|start|>{role}", "")
        if role == "assistant"
        else (f"<|start|>{role}<|message|>", "<|end|>")
        for role in ("system", "user", "assistant", "tool")
    },
    answer="<|channel|>final<|message|>",
    tools=("<|start|>developer<|message|>", "<|end|>"),
    template=(
        "{% if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}"
        "{% endif %}{% for m in messages %}{{ '<|start|>' + m.role }}"
        "{% if m.role == 'assistant' %}"
        # Two tags that touch, as where reasoning and answer are marked one by one.
        "{% generation %}{{ '<|channel|>final<|message|>' }}{% endgeneration %}"
        "{% generation %}{{ m.content }}" + _CALLS + "{{ '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
)
GEMMA = Family(
    special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    end="<end_of_turn>",
    around={
        role: (
            f"<start_of_turn>{'model' if role == 'assistant' else role}\n",
            "\n" if role == "assistant" else "<end_of_turn>\n",
        )
        for role in ("system", "user", "assistant", "tool")
    },
    tools=("<start_of_turn>tools\n", "<end_of_turn>\n"),
    template=(
        "{{ bos_token }}{% if tools %}{{ '<start_of_turn>tools\\n' + (tools | tojson) + "
        "'<end_of_turn>\\n' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}{% generation %}"
        "{{ m.content }}" + _CALLS + "{{ '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
)

FAMILIES = {
    "qwen": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "gpt-oss": HARMONY,
    "gemma": GEMMA,
}
