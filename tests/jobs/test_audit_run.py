"""The audit of an adapter: every form has the figures of the same model whole, and what stands out stands out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.evidence import difference_in_words
from studio.core.intervals import Interval
from studio.core.recipe import Recipe
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.serving import NEW_TOKENS, timed
from studio.jobs.base.embedded import ensure_embedded
from studio.jobs.base.tokenizer import load_tokenizer
from studio.probe.audit import audit_of_run
from studio.runs.layout import ADAPTER_WEIGHTS, RunPaths
from tests.fakes.tiny_model import make_tiny_model, tiny_tokenizer
from tests.jobs.adapter_cases import FOUR, adapted, asked, cast, merged, plain_forms, save_merged, tuned, write_chats
from tests.jobs.audit_cases import audit, figures_of, log_probabilities, plain_figures, rounded, whole_model
from tests.jobs.conftest import QUESTIONS, Train, history_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "data.jsonl")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("half") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def trained(recipe: Recipe, half: Path, train: Train) -> RunPaths:
    """A QLoRA run of some steps on a tiny bf16 model."""
    return train(tuned(recipe, half).with_("method", "qlora"))


def assert_figures_of_the_whole_model(run: RunPaths, base: Path, folder: Path, **more: str) -> None:
    """The audit of a run has, for every form, the figures of that form whole in memory, with full logits in fp32."""
    request = asked(run, **more)
    _, report = audit(folder, request)
    rows = read_audit_rows(request, load_tokenizer(run.adapter), lambda text: None).task
    forms = plain_forms(base, run)
    assert [one["name"] for one in report["variants"]] == list(forms)
    meant = log_probabilities(forms["trained"], rows)
    for one in report["variants"]:
        loss, kl, same = figures_of(log_probabilities(forms[one["name"]], rows), meant, rows)
        assert one["task"]["loss"]["value"] == pytest.approx(loss, rel=1e-4), one["name"]
        assert one["task"]["kl"]["value"] == pytest.approx(kl, rel=1e-4, abs=2e-6), one["name"]
        assert one["task"]["same_top"]["value"] == pytest.approx(same, abs=1e-6), one["name"]


def test_every_form_has_the_figures_of_the_whole_model(trained: RunPaths, half: Path, tmp_path: Path) -> None:
    assert_figures_of_the_whole_model(trained, half, tmp_path / "audit")


@pytest.mark.slow
def test_every_form_of_the_embedded_model_has_the_figures_of_the_whole_model(
    recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    base = ensure_embedded()
    few = tuned(recipe, base).with_("method", "qlora").with_("train.steps", 3).with_("eval.rows", 4)
    text = tmp_path / "short.txt"
    text.write_text("A short passage, since only the rows are compared here.")
    assert_figures_of_the_whole_model(train(few), base, tmp_path / "audit", text=str(text))


def test_forms_of_a_base_stored_in_fp32_do_not_change_each_other(
    recipe: Recipe, tiny: Path, train: Train, tmp_path: Path
) -> None:
    """Its weights need no cast, so that a merge in place would change what the base alone is made from."""
    run = train(tuned(recipe, tiny))
    request = asked(run)
    _, report = audit(tmp_path / "audit", request)
    rows = read_audit_rows(request, load_tokenizer(run.adapter), lambda text: None).task
    forms = {"trained": adapted(whole_model(tiny), run), "base alone": whole_model(tiny)}
    forms["merged 16-bit"] = merged(whole_model(tiny), run)
    meant = log_probabilities(forms["trained"], rows)
    by_name = {one["name"]: one["task"] for one in report["variants"]}
    for name, model in forms.items():
        loss, kl, _ = figures_of(log_probabilities(model, rows), meant, rows)
        assert by_name[name]["loss"]["value"] == pytest.approx(loss, rel=1e-4), name
        assert by_name[name]["kl"]["value"] == pytest.approx(kl, rel=1e-4, abs=2e-6), name
    # The training's own losses of the same rows, before and after.
    evals = history_of(run).evals
    assert by_name["base alone"]["loss"]["value"] == pytest.approx(evals[0].loss, rel=1e-4)
    assert by_name["trained"]["loss"]["value"] == pytest.approx(evals[-1].loss, rel=1e-4)


def test_what_it_leaves_in_the_run(trained: RunPaths, tmp_path: Path) -> None:
    paths, report = audit(tmp_path / "audit", asked(trained))
    beside = json.loads((trained.root / "audit.json").read_text())
    assert beside["recommendation"] == report["recommendation"]
    assert "| trained |" in beside["markdown"]
    by_name = {one["name"]: one for one in report["variants"]}
    assert by_name["merged 16-bit"]["disk_bytes"] > by_name[f"merged 16-bit, {FOUR}"]["disk_bytes"]
    serving = by_name["merged 16-bit"]["serving"]
    assert by_name["merged 16-bit"]["disk_bytes"] < serving["low_bytes"] < serving["expected_bytes"]
    # Both halves of the ratio against weights read straight from the files.
    block = report["blocks"][0]
    tensors = load_file(Path(audit_of_run(trained).model) / "model.safetensors")
    names = [name for name in tensors if name.startswith(f"{block['name']}.") and tensors[name].dim() == 2]
    change = rounded(FOUR)
    wholes = [tensors[name].float() for name in names]
    error = sum(float((change("", whole) - whole).square().sum()) for whole in wholes)
    delta = sum(float(_delta(trained, name).square().sum()) for name in names)
    assert block["rounding"] == pytest.approx((error / sum(float(w.square().sum()) for w in wholes)) ** 0.5, rel=1e-4)
    assert block["ratio"] == pytest.approx((error / delta) ** 0.5, rel=1e-4)
    assert (paths.root / "report.md").is_file()


@pytest.mark.slow
def test_forgetting_and_speeds_stand_in_the_report(trained: RunPaths, half: Path, tmp_path: Path) -> None:
    request = asked(trained, speed=True)
    _, report = audit(tmp_path / "audit", request)
    rows = read_audit_rows(request, load_tokenizer(trained.adapter), lambda text: None).neutral
    forms = plain_forms(half, trained)
    before, after = (plain_figures(forms[name], forms["trained"], rows)[0] for name in ("base alone", "trained"))
    forgetting = report["forgetting"]
    assert forgetting["before"]["loss"]["value"] == pytest.approx(before, rel=1e-4)
    assert forgetting["after"]["loss"]["value"] == pytest.approx(after, rel=1e-4)
    assert forgetting["more"]["value"] == pytest.approx(after - before, rel=1e-3)
    assert forgetting["more"]["low"] <= forgetting["more"]["value"] <= forgetting["more"]["high"]
    assert f"{forgetting['after']['tokens']:,} tokens of {len(rows)} passages" in forgetting["verdict"]
    by_name = {one["name"]: one["speed"] for one in report["variants"]}
    for name, speed in by_name.items():
        assert (speed["how"], speed["device"], speed["tokens"]) == ("measured", "cpu", 32), name
        assert speed["decode_tokens_per_second"] > 1 and speed["prefill_tokens_per_second"] > 1
    assert by_name["merged 16-bit"] == by_name["merged dequantized"], "one measurement of one form"
    assert by_name["trained"] != by_name["on 16-bit"]


def test_an_adapter_times_zero_is_called_no_effect(trained: RunPaths, tmp_path: Path) -> None:
    change_adapter(trained, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)
    _, report = audit(tmp_path / "audit", asked(trained))
    assert "has no effect" in report["recommendation"]["sentence"] and report["next"]
    alone = next(one for one in report["variants"] if one["name"] == "base alone")
    assert alone["task"]["kl"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert all(block["ratio"] is None for block in report["blocks"])
    assert "No forgetting can be seen" in report["forgetting"]["verdict"]
    assert {one["speed"]["why"] for one in report["variants"]} == {"speed was not asked for"}


@pytest.mark.slow
def test_an_adapter_that_does_harm_is_not_advised(trained: RunPaths, tmp_path: Path) -> None:
    change_adapter(trained, lambda name, tensor: tensor * -2 if "lora_B" in name else tensor)
    few = asked(trained)
    _, report = audit(tmp_path / "few", few)
    assert report["recommendation"]["sentence"].startswith("Too little to say whether the adapter helps")
    asks = [(f"{question} of {n}", f"{n} {reply}") for n in range(4) for question, reply in QUESTIONS]
    table = [{"prompt": question, "completion": reply} for question, reply in asks]
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps(row) for row in table))
    _, report = audit(tmp_path / "audit", asked(trained, data=str(more), format="auto"))
    assert report["recommendation"]["sentence"].startswith("Do not use this adapter") and report["next"]
    assert report["rows"]["task"] == report["held_out_rows"] == 24


def test_noise_alone_is_no_difference(trained: RunPaths, half: Path, tmp_path: Path) -> None:
    """Every weight a ten-thousandth off, with a sign of its own."""
    torch.manual_seed(1)
    folder = tmp_path / "noise"
    save_merged(cast(merged(whole_model(half, rounded(FOUR)), trained)), folder, noise=1e-4)
    paths, report = audit(tmp_path / "audit", asked(trained, merged=(str(folder),)))
    given = report["variants"][-1]["task"]
    assert "no difference seen" in difference_in_words(Interval(**given["more"]))
    row = next(
        line for line in (paths.root / "report.md").read_text().splitlines() if line.startswith("| given: noise")
    )
    assert "noise" in row.removeprefix("| given: noise")
    assert given["kl"]["value"] > 0


@pytest.mark.slow
def test_a_merge_with_another_base_stands_out(trained: RunPaths, half: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", dtype=torch.bfloat16, seed=5)
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    save_merged(cast(merged(whole_model(half), trained)), right)
    save_merged(cast(merged(whole_model(other), trained)), wrong)
    _, report = audit(tmp_path / "audit", asked(trained, merged=(str(right), str(wrong))))
    by_name = {one["name"]: one["task"] for one in report["variants"]}
    assert by_name["given: right"] == by_name["merged 16-bit"]
    kls = {name: one["kl"]["value"] for name, one in by_name.items()}
    assert max(kls, key=kls.__getitem__) == "given: wrong"
    assert by_name["given: wrong"]["more"]["low"] > 0


def test_a_lora_run_is_compared_with_four_bits_afterwards(
    recipe: Recipe, half: Path, train: Train, tmp_path: Path
) -> None:
    run = train(tuned(recipe, half))
    _, report = audit(tmp_path / "audit", asked(run))
    names = [one["name"] for one in report["variants"]]
    assert names == ["trained", "base alone", f"on {FOUR}", "merged 16-bit", f"merged 16-bit, {FOUR}", "merged 4-bit"]
    by_name = {one["name"]: one["task"] for one in report["variants"]}
    assert by_name["merged 16-bit"]["kl"]["value"] < by_name[f"on {FOUR}"]["kl"]["value"]


@pytest.mark.slow
def test_an_adapter_on_head_and_embedding_and_a_module_saved_whole(
    recipe: Recipe, half: Path, train: Train, tmp_path: Path
) -> None:
    """peft's own adapter of every kind at once, put in the place of the trained one."""
    run = train(tuned(recipe, half).with_("method", "qlora"))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"], use_dora=True
    )
    torch.manual_seed(3)
    model = get_peft_model(whole_model(half), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(str(run.adapter), save_embedding_layers=False)
    tiny_tokenizer().save_pretrained(run.adapter)
    request = asked(run)
    _, report = audit(tmp_path / "audit", request)
    rows = read_audit_rows(request, load_tokenizer(run.adapter), lambda text: None).task
    forms = plain_forms(half, run)
    by_name = {one["name"]: one["task"] for one in report["variants"]}
    for name in ("trained", "base alone", "on 16-bit", "merged 16-bit"):
        loss, kl, _ = plain_figures(forms[name], forms["trained"], rows)
        assert by_name[name]["loss"]["value"] == pytest.approx(loss, rel=2e-4), name
        assert by_name[name]["kl"]["value"] == pytest.approx(kl, rel=2e-3, abs=2e-6), name


def test_another_base_of_equal_shape_is_refused(trained: RunPaths, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", dtype=torch.bfloat16, seed=5)
    paths, report = audit(tmp_path / "audit", asked(trained, model=str(other)))
    assert not report
    assert "is not the base" in history_of(paths).failed.message  # type: ignore[union-attr]


def change_adapter(run: RunPaths, change: Any) -> None:
    path = run.adapter / ADAPTER_WEIGHTS
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _delta(run: RunPaths, name: str) -> Tensor:
    tensors = load_file(run.adapter / ADAPTER_WEIGHTS)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    return 2.0 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_model_is_timed_by_names_that_its_library_will_keep(tiny: Path) -> None:
    speed = timed(whole_model(tiny).eval(), [1, 2, 3])
    assert (speed.prompt_tokens, speed.tokens) == (3, NEW_TOKENS)
