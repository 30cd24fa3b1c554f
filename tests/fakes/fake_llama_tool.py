"""Stands in for llama.cpp's tools: `python -I fake_llama_tool.py TOOLS VERB ...`. How it behaves, TOOLS/behaviour says.

`vocab`, `convert`, `lora`, `quantize` write a little; `tokens` reads every text as one token a byte, as the tiny
tokenizer does; `logits` and `stream` give what the test put into TOOLS/answers.f32, of a vocabulary of TOOLS/vocabulary
tokens; `speed` says that it took two seconds. `VERB fails`, `dies` or `hangs` does that.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<pad>": 258}


def tokens(text: str, alphabet: list[int]) -> list[int]:
    found: list[int] = []
    while text:
        word = next((word for word in SPECIAL if text.startswith(word)), "")
        if word:
            found.append(SPECIAL[word])
            text = text[len(word) :]
        else:
            found += [alphabet[byte] for byte in text[0].encode()]
            text = text[1:]
    return found


def main(tools: Path, verb: str, words: list[str]) -> None:
    behaviour = (tools / "behaviour").read_text() if (tools / "behaviour").exists() else ""
    if f"{verb} fails" in behaviour:
        print("ERROR:hf-to-gguf:Model FancyForCausalLM is not supported", file=sys.stderr)
        sys.exit(1)
    if f"{verb} dies" in behaviour:
        os.kill(os.getpid(), signal.SIGKILL)
    if f"{verb} hangs" in behaviour:
        Path(tools / "hanging").touch()
        time.sleep(60)
    if verb == "tokens":
        alphabet = json.loads((tools / "alphabet").read_text())
        rows = [tokens(text, alphabet) for text in json.loads(Path(words[1]).read_text())]
        if "tokens differ" in behaviour:
            rows[0] = [*rows[0][:4], 7, *rows[0][4:]]
        table = {"rows": [{"ids": row, "with_added": row} for row in rows], "bos": 256, "eos": 257, "adds_bos": False}
        ends = [] if "no stops" in behaviour else [257]
        Path(words[2]).write_text(json.dumps({**table, "ends": ends}))
    elif verb == "logits":
        asked = sum(len(row) for row in json.loads(Path(words[1]).read_text()))
        answers = bytearray((tools / "answers.f32").read_bytes())[: 4 * asked * int((tools / "vocabulary").read_text())]
        if "logits differ" in behaviour:
            answers[: len(answers) // 2] = bytes(len(answers) // 2)
        Path(words[2]).write_bytes(answers)
    elif verb == "stream":
        sys.stdout.buffer.write(int((tools / "vocabulary").read_text()).to_bytes(8, "little"))
        sys.stdout.buffer.write((tools / "answers.f32").read_bytes())
    elif verb == "speed":
        took = {"prefill_seconds": 2.0, "decode_seconds": 2.0, "decoded": int(words[2]), "threads": 1}
        Path(words[3]).write_text(json.dumps(took))
    else:
        Path(words[2] if verb == "lora" else words[1]).write_bytes(b"GGUF of a stand-in")
        (tools / verb).write_text(json.dumps(words))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
