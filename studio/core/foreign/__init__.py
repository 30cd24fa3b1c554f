"""Other tools' configurations as recipes: what each setting means here, what has no place here, and why.

Names and defaults are those of the tools' sources: axolotl (utils/schemas), LLaMA-Factory (hparams, data/parser.py),
TRL (sft_config.py, dpo_config.py, model_config.py), Unsloth (get_peft_model), peft 0.21 and transformers 5.24. This
room knows tables and texts, no files: `studio.probe.foreign_file` reads them, and never runs a script.
"""
