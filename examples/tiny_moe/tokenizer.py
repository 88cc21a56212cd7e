"""The tokenizer of tiny-moe: 2,048 byte-level BPE tokens, digits one by one.

Encoding puts `<s>` in front by itself; `</s>` ends a document and is added by whoever packs or
answers. Single digits let a small model learn arithmetic and numbers place by place.
"""

import random
from pathlib import Path

import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2_048
CONTEXT = 1_024  # tokens
PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"
SAMPLE = 4_000  # documents a domain shows to the BPE trainer, cut to 2,000 characters each

# The generation markers let trainers find the assistant's tokens; the closing `</s>` is inside,
# because the model has to learn to stop.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|assistant|>' -}}{% generation %}{{- message.content + eos_token -}}{% endgeneration %}
{%- elif message.role == 'user' -%}
{{- '<|user|>' + message.content -}}
{%- else -%}
{{- raise_exception('tiny-moe knows the roles user and assistant, not ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """Train on a sample of every domain's training documents (`folder`: a built corpus)."""
    rng = random.Random(f"tiny-moe/{seed}/tokenizer")
    sample = []
    for domain in corpus.DOMAINS:
        documents = corpus.read(folder, domain.name, "train")
        sample += [d[:2_000] for d in rng.sample(documents, min(SAMPLE, len(documents)))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
