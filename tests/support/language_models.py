"""
Tokenizers and language models of the newest families' text encoders: the real classes, random weights, a few
numbers wide.
"""

from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from support.pipelines import WORDS


CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
ROLES = "user system assistant"


def byte_level(words):
    """Every byte as a printable character, and merges that make each word, with a space before and without."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("Ċ", "Ċ")]  # two line breaks
    for word in words:
        left, *rest = word
        for right in rest:
            merges.append((left, right))
            left += right
        merges.append(("Ġ", word))
    merges = list(dict.fromkeys(merges))
    tokens += [left + right for left, right in merges]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def qwen_tokenizer():
    vocab, merges = byte_level([*ROLES.split(), *WORDS.split()])
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def sizes(tokenizer, width, layers=3):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen3(tokenizer, width=64, layers=3):
    return Qwen3Model(Qwen3Config(**sizes(tokenizer, width, layers), head_dim=16)).eval()
