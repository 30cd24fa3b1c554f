"""lora-studio: fine-tune a language model with LoRA or QLoRA, and see what the choice between them costs."""

__version__ = "0.1.0"
