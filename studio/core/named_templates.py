"""Chat templates by name, for base models without one, and for whoever wants another than the model's own.

Each is written after the format that its authors publish. Where the tokenizer begins texts with its start token,
`{{ bos_token }}` is put before it. What `add_generation_prompt` writes is how an answer's turn begins.
"""

from dataclasses import dataclass

_ASKING = "{%- if add_generation_prompt %}{{ "
_SYSTEM_FIRST = (
    "{%- set system = messages[0]['content'] + '\n\n' if messages and messages[0]['role'] == 'system' else '' %}"
    "{%- set turns = messages[1:] if system else messages %}"
)
"""For formats without a system turn: its text goes before the first user's, as Gemma 3's and Mistral's templates do."""


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A chat template.

    Attributes:
        name: What a recipe calls it: a name from here, or a file's path.
        text: The template, in jinja.
        tokens: What the tokenizer must have as single tokens.
        end: The token that ends an answer; empty for the tokenizer's own end token.
    """

    name: str
    text: str
    tokens: tuple[str, ...] = ()
    end: str = ""


def _made(
    name: str, turn: str, ask: str, *tokens: str, end: str = "", before: str = "", turns: str = "messages"
) -> NamedTemplate:
    loop = f"{before}{{%- for message in {turns} %}}{turn}{{%- endfor %}}"
    return NamedTemplate(name, f"{loop}{_ASKING}{ask} }}}}{{%- endif %}}", tokens, end)


_BY_ROLE = "{{%- if message['role'] == 'assistant' %}}{answer}{{%- elif message['role'] == 'system' %}}{system}"
_BY_ROLE += "{{%- else %}}{user}{{%- endif %}}"
_FIRST = "{{%- if message['role'] == 'assistant' %}}{answer}{{%- else %}}{user}{{%- endif %}}"
_WITH_SYSTEM = "(system if loop.first else '')"

_ALL = (
    # OpenAI's ChatML, as Qwen's models have it.
    _made(
        "chatml",
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
        "'<|im_start|>assistant\n'",
        "<|im_start|>",
        "<|im_end|>",
        end="<|im_end|>",
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
    _made(
        "llama3",
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}",
        "'<|start_header_id|>assistant<|end_header_id|>\n\n'",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        end="<|eot_id|>",
    ),
    # https://ai.google.dev/gemma/docs/core/prompt-structure
    _made(
        "gemma",
        _FIRST.format(
            answer="{{ '<start_of_turn>model\n' + message['content'] + '<end_of_turn>\n' }}",
            user=f"{{{{ '<start_of_turn>user\n' + {_WITH_SYSTEM} + message['content'] + '<end_of_turn>\n' }}}}",
        ),
        "'<start_of_turn>model\n'",
        "<start_of_turn>",
        "<end_of_turn>",
        end="<end_of_turn>",
        before=_SYSTEM_FIRST,
        turns="turns",
    ),
    # https://docs.mistral.ai: the instruct format; older tokenizers have no tokens for its marks, and need none.
    _made(
        "mistral",
        _FIRST.format(
            answer="{{ ' ' + message['content'] + (eos_token or '') }}",
            user=f"{{{{ '[INST] ' + {_WITH_SYSTEM} + message['content'] + ' [/INST]' }}}}",
        ),
        "''",
        before=_SYSTEM_FIRST,
        turns="turns",
    ),
    # Microsoft's model cards of Phi-3.
    _made(
        "phi3",
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}",
        "'<|assistant|>\n'",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        end="<|end|>",
    ),
    # HuggingFaceH4's model card of Zephyr; its marks are plain text, the end is the tokenizer's own.
    _made(
        "zephyr",
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + (eos_token or '') + '\n' }}",
        "'<|assistant|>\n'",
    ),
    # lm-sys/FastChat, the format of Vicuna 1.1 and later.
    _made(
        "vicuna",
        _BY_ROLE.format(
            answer="{{ 'ASSISTANT: ' + message['content'] + (eos_token or '') }}",
            system="{{ message['content'] + ' ' }}",
            user="{{ 'USER: ' + message['content'] + ' ' }}",
        ),
        "'ASSISTANT:'",
    ),
    # tatsu-lab/stanford_alpaca, without an input; a system turn takes the place of its first sentence.
    _made(
        "alpaca",
        _BY_ROLE.format(
            answer="{{ '### Response:\n' + message['content'] + (eos_token or '') + '\n\n' }}",
            system="{{ message['content'] + '\n\n' }}",
            user="{{ '### Instruction:\n' + message['content'] + '\n\n' }}",
        ),
        "'### Response:\n'",
        before="{%- if not messages or messages[0]['role'] != 'system' %}{{ 'Below is an instruction that describes a "
        "task. Write a response that appropriately completes the request.\n\n' }}{%- endif %}",
    ),
)

NAMED = {template.name: template for template in _ALL}
"""The templates by name."""
