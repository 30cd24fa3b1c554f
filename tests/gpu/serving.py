"""What is done with a model after training: generation, a chat, one block of an audit."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from studio.jobs.audit.blocks import filled, first_of, noted_calls, parts_of, settled
from studio.jobs.audit.forms import FORMS
from studio.jobs.base.generation import greedy
from studio.jobs.base.tokenizer import stop_ids
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.runs.chat import Answered, ChatProcess, ChatRequest, Piece, Ready, Sampling, TurnDone
from studio.runs.piped import NotAnswered
from tests.gpu.bench import WORDS, Bench, Seen
from tests.gpu.numbers import TOLERANCE, _on_cpu, apart

_NEW_TOKENS = 12


def generation(bench: Bench) -> Seen:
    """Greedy answers with the cache: the tokens that whole forward passes in fp64 on the CPU find likeliest."""
    folder = bench.shared / "tiny"
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(bench.place).eval()
    plain: Any = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").double().eval()
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = [list(tokenizer(text).input_ids) for text in ("uno", "a longer question than the others", "3")]
    stops = stop_ids(tokenizer, model.generation_config)
    surest = float("inf")
    for prompt in prompts:
        made = greedy(model, prompt, stops=stops, new_tokens=_NEW_TOKENS, cancelled=lambda: False)
        wanted: list[int] = []
        with torch.no_grad():
            while len(wanted) < len(made):
                logits = plain(input_ids=torch.tensor([prompt + wanted])).logits[0, -1]
                best = logits.topk(2).values
                surest = min(surest, float((best[0] - best[1]) / logits.abs().max()))
                wanted.append(int(logits.argmax()))
        # A tie within fp32's rounding could go either way; the tiny model's are far from it, which is printed.
        assert made == wanted, f"{made}, wanted {wanted}; the closest two logits are {surest:.1e} apart"
        assert len(made) == _NEW_TOKENS or made[-1] in stops
    return Seen(
        f"{len(prompts)} prompts, {_NEW_TOKENS} tokens each; the closest decision was {surest:.1e} of the largest logit"
    )


def chat(bench: Bench, method: str) -> Seen:
    """A trained adapter in a chat's own process: both sides answer, on the device."""
    recipe = bench.tiny(method=method, train__steps=30)
    paths = bench.job(recipe, module="studio.jobs.train")
    history = bench.history(paths)
    assert history.failed is None, history.failed
    request = ChatRequest(
        base=str(bench.shared / "tiny"),
        adapter=str(paths.adapter),
        method=method,
        dtype="fp32",
        device=bench.device,
    )
    texts: dict[str, str] = {"tuned": "", "base": ""}
    ready: Ready | None = None
    answers: list[Answered] = []
    with ChatProcess(request) as process:
        for event in process.events(until=Ready):
            assert not isinstance(event, NotAnswered), event
            ready = event if isinstance(event, Ready) else ready
        question = [{"role": "user", "content": "2"}]
        process.ask({"tuned": question, "base": question}, Sampling(max_new_tokens=8))
        for event in process.events(until=TurnDone):
            assert not isinstance(event, NotAnswered), event
            if isinstance(event, Piece):
                texts[event.side] += event.text
            elif isinstance(event, Answered):
                answers.append(event)
    assert ready is not None and ready.device.startswith(bench.device), ready
    assert texts["tuned"].strip() == WORDS[2], f"the tuned side says {texts['tuned']!r}, wanted {WORDS[2]!r}"
    assert texts["base"] != texts["tuned"], "the base says the same"
    pace = sum(one.tokens for one in answers) / max(1e-9, sum(one.seconds for one in answers))
    return Seen(
        f"on {ready.device}, {ready.dtype}: {texts['tuned']!r}; {pace:.0f} tokens/s", (), {"tokens_per_second": pace}
    )


def audit_block(bench: Bench, form: str) -> Seen:
    """One block as the audit runs it, rounded, against the same block in fp64 on the CPU with the unpacked weights."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = FolderWeights.of(bench.shared / "tiny")
    parts = parts_of(weights.clean)
    name, block = parts.blocks[0]
    torch.manual_seed(3)
    hidden = torch.randn(2, 10, 64)
    ids = torch.arange(20).reshape(2, 10)
    with (
        settled(parts, weights.read, weights.picked("model.embed_tokens.weight", range(20)), bench.place),
        torch.no_grad(),
    ):
        calls, _ = noted_calls(parts, ids.to(bench.place))
        args, kwargs = calls[0]
        with filled(name, block, weights.read, lambda _: FORMS[form], bench.place) as roundings:
            found = first_of(block(hidden.to(bench.place), *args, **kwargs))
    plain: Any = LlamaForCausalLM.from_pretrained(
        bench.shared / "tiny", dtype=torch.float32, attn_implementation="eager"
    ).double()
    layer = plain.model.layers[0]
    rounded = 0
    if form != "16-bit":
        code, _, nested = form.partition("+")
        for module in layer.modules():
            if type(module) is torch.nn.Linear:
                packed, state = quantize_4bit(
                    module.weight.data.float().to(bench.place), quant_type=code, compress_statistics=bool(nested)
                )
                module.weight.data = dequantize_4bit(packed.cpu(), _on_cpu(state)).double()
                rounded += 1
    with torch.no_grad():
        positions = torch.arange(10)[None]
        cos, sin = plain.model.rotary_emb(hidden.double(), positions)
        mask = torch.full((10, 10), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        wanted = first_of(layer(hidden.double(), attention_mask=mask, position_embeddings=(cos, sin)))
    most = apart(found, wanted)
    assert len(roundings) == rounded, (len(roundings), rounded)
    assert most <= TOLERANCE["fp32"], f"{most:.1e} apart, allowed {TOLERANCE['fp32']:.0e}"
    return Seen(f"{most:.1e} apart, {rounded} layers rounded")


def audit(bench: Bench) -> Seen:
    """An audit of the tiny base as a job: its own proof against the model's forward pass, and its figures' order."""
    from studio.runs.requests import AuditRequest

    rows = [{"prompt": f"question {number}", "completion": f"{WORDS[number % 8]} {number}"} for number in range(40)]
    data = bench.folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    request = AuditRequest(
        "base",
        model=str(bench.shared / "tiny"),
        data=str(data),
        rows=8,
        forms=("nf4", "nf4+dq"),
        kept=(1,),
        speed=False,
    )
    paths = bench.job(request, module="studio.jobs.audit")
    history = bench.history(paths)
    assert history.failed is None, history.failed
    report = json.loads(Path(paths.report).read_text("utf-8"))
    first, *others = report["variants"]
    assert first["task"]["kl"]["value"] == 0.0
    assert all(one["task"]["kl"]["value"] > 0 for one in others)
    told = ", ".join(f"{one['name']} KL {one['task']['kl']['value']:.3f}" for one in others)
    return Seen(
        f"its walk is {report['proof_gap']:.1e} from the forward pass; {told}", (), {"proof_gap": report["proof_gap"]}
    )
