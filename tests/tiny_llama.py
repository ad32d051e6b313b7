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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=vocab_size or len(vocab), initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
