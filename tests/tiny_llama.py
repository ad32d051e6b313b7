"""A random Llama of two layers and a tokenizer of a few words, in a folder, for the examples."""

from pathlib import Path

import torch

WORDS = "<pad> <user> <assistant> <end> one two three many and hi there yes no , never too of them"
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def save_tiny_llama(folder: Path, *, vocab_size: int | None = None) -> Path:
    """Write model and tokenizer; the model's vocabulary is the tokenizer's by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vocab_size = vocab_size or 1 + len(WORDS.split())
    LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, initializer_range=0.5, **sizes)
    ).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """Write the tokenizer alone: a token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<end>",
        eos_token="<end>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder
