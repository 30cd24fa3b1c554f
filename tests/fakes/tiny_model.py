"""A tiny random Llama with a byte-level tokenizer and a chat template: shapes and code paths, no knowledge."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**changes: object) -> LlamaConfig:
    """Return the shape: 2 layers, hidden 64; linear layers have multiples of 64 inputs, as NF4's blocks want."""
    values: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 258,
    }
    return LlamaConfig(**{**values, **changes})


def make_tiny_model(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Path:
    """Write a model folder, weights, tokenizer and template, and return it."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).to(dtype)
    # With a head of the usual random size no hidden state of 64 numbers could make one of 259 tokens certain.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(16.0 if name.startswith("lm_head") else 4.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
