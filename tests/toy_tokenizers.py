"""Small tokenizers for tests, built in memory: bytes as tokens, special tokens, a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# As the real families write them, less tools and images. Hand-copied in form, not generated.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + "
    "(message['role'] if message['role'] != 'assistant' else 'model') + '\\n' + "
    "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% else %}"
    "{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Drops the reasoning of every answer but the last, as Qwen3's does.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer(
    special: Sequence[str] = ("<s>", "</s>", "<pad>"),
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    template: str | None = None,
    adds_bos: bool = True,
    adds_eos: bool = False,
    merges_from: Sequence[str] = (),
    merges: int = 0,
) -> Any:
    """Return a fast byte-level BPE tokenizer: one token a byte, plus `merges` learned merges.

    Args:
        special: special tokens; their ids come first, in order.
        bos: name of a special token, as `eos` and `pad`.
        eos: see `bos`.
        pad: see `bos`.
        template: a chat template.
        adds_bos: whether `tokenizer(text)` puts BOS in front.
        adds_eos: whether it puts EOS behind.
        merges_from: text to learn the merges from.
        merges: how many merges to learn.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        merges_from,
        trainers.BpeTrainer(
            vocab_size=len(special) + len(alphabet) + merges,
            special_tokens=[AddedToken(token, special=True) for token in special],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    start = f"{bos} " if adds_bos and bos else ""
    end = f" {eos}" if adds_eos and eos else ""
    if start or end:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{start}$A{end}",
            special_tokens=[(token, inner.token_to_id(token)) for token in (bos, eos) if token],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
