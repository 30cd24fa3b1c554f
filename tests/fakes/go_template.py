"""What Ollama makes of a Modelfile and a conversation, by Go's own `text/template` and Ollama's rules around it.

Where a conversation brings no system prompt the Modelfile's goes in front; neighbours of one role become one message,
and `.System` is all system prompts together (template.go of Ollama: `collate`, `Execute`). Needs Go.
"""

import atexit
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tests.fakes.modelfile_reader import read_modelfile

HAS_GO = shutil.which("go") is not None
_SOURCE = """
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func collate(told []message) (string, []*message) {
	var system []string
	var kept []*message
	for i := range told {
		if told[i].Role == "system" {
			system = append(system, told[i].Content)
		}
		if n := len(kept); n > 0 && kept[n-1].Role == told[i].Role {
			kept[n-1].Content += "\\n\\n" + told[i].Content
		} else {
			kept = append(kept, &told[i])
		}
	}
	return strings.Join(system, "\\n\\n"), kept
}

func main() {
	var asked struct {
		Template      string
		Conversations [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	var written []string
	for _, told := range asked.Conversations {
		system, messages := collate(told)
		var text bytes.Buffer
		if err := parsed.Execute(&text, map[string]any{"System": system, "Messages": messages}); err != nil {
			panic(err)
		}
		written = append(written, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(written)
}
"""


def ollama_prompts(modelfile: str, conversations: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """Return the text that Ollama gives the model for each conversation of roles and words.

    Raises:
        KeyError: The Modelfile has no template of its own.
        ValueError: Ollama would refuse it.
    """
    read = dict(read_modelfile(modelfile))
    system = [("system", read["system"])] if "system" in read else []
    told = [[*(system if turns[0][0] != "system" else []), *turns] for turns in conversations]
    table = [[{"Role": role, "Content": words} for role, words in turns] for turns in told]
    asked = json.dumps({"Template": read["template"], "Conversations": table})
    done = subprocess.run([_program()], input=asked, capture_output=True, text=True, check=True)
    prompts: list[str] = json.loads(done.stdout)
    return prompts


@lru_cache
def _program() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="go-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "main.go").write_text(_SOURCE)
    (folder / "go.mod").write_text("module render\n\ngo 1.19\n")
    subprocess.run(["go", "build", "-o", "render", "."], cwd=folder, check=True, capture_output=True)
    return folder / "render"
