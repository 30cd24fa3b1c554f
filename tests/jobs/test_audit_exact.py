"""The audit's figures are those of the plainest computation: the whole model in memory, full logits, fp32."""

from pathlib import Path

import pytest
import torch

from studio.jobs.audit.blocks import disagreement, renumbered
from studio.jobs.audit.walk import Carried, Walk
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.audit_cases import CPU, examples, plain_figures, plain_model, variants_of

NAMES = ["16-bit", "nf4", "nf4+dq", "fp4", "int8"]
ROWS = (5, 17, 17, 40, 33, 8, 2)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model stored in bf16, with a bias in its attention and a head tied to its embedding."""
    folder = tmp_path_factory.mktemp("half") / "tiny"
    return make_tiny_model(folder, dtype=torch.bfloat16, attention_bias=True, tie_word_embeddings=True)


@pytest.fixture(params=["fp32", "bf16, tied, biased"])
def folder(request: pytest.FixtureRequest, tiny: Path, half: Path) -> Path:
    return tiny if request.param == "fp32" else half


def walked(folder: Path, rows: list[object], names: list[str] = NAMES, **more: object) -> Walk:
    parts, variants = variants_of(folder, names)
    walk = Walk(parts, variants, rows, device=CPU, **more)  # type: ignore[arg-type]
    assert walk.run(lambda fraction, detail: None, lambda carried: False)
    return walk


def test_every_variant_has_the_figures_of_the_whole_model(folder: Path) -> None:
    rows = examples(*ROWS)
    found = walked(folder, list(rows)).scores()
    reference = plain_model(folder, "16-bit")
    for name in NAMES:
        loss, kl, same = plain_figures(plain_model(folder, name), reference, rows)
        scores = found[name]
        assert float(scores.loss.mean()) == pytest.approx(loss, rel=1e-4), name
        assert float(scores.kl.mean()) == pytest.approx(kl, rel=1e-4, abs=1e-7), name
        assert float(scores.same.double().mean()) == pytest.approx(same, abs=1e-6), name
        assert scores.loss.shape[0] == sum((length - 1) - max(length // 2 - 1, 0) for length in ROWS if length > 1)


def test_the_walk_is_the_models_own_forward_pass_to_the_bit(folder: Path) -> None:
    parts, (variant,) = variants_of(folder, ["16-bit"])
    ids = torch.from_numpy(examples(24)[0].input_ids).long()[None]
    used = sorted(set(ids.flatten().tolist()))
    gap = disagreement(
        parts, variant.read, variant.head, embedding=variant.embed(used), ids=renumbered(ids, used), device=CPU
    )
    assert gap == 0.0


def test_nothing_stays_in_the_models_place(tiny: Path) -> None:
    parts, variants = variants_of(tiny, NAMES)
    before = {name: type(module) for name, module in parts.causal.named_modules()}
    Walk(parts, variants, examples(9, 4), device=CPU).run(lambda fraction, detail: None, lambda carried: False)
    assert {name: type(module) for name, module in parts.causal.named_modules()} == before
    assert all(parameter.is_meta for parameter in parts.causal.parameters())


def test_a_walk_that_was_stopped_goes_on_to_the_same_bits(tiny: Path) -> None:
    rows = examples(*ROWS)
    parts, variants = variants_of(tiny, NAMES)
    first = Walk(parts, variants, rows, device=CPU, alone="nf4+dq")
    assert not first.run(lambda fraction, detail: None, lambda carried: True)
    kept = Carried(first.carried.hidden, first.carried.seen)
    assert len(kept.seen) == 1
    parts, variants = variants_of(tiny, NAMES)
    second = Walk(parts, variants, rows, device=CPU, alone="nf4+dq", carried=kept)
    assert second.run(lambda fraction, detail: None, lambda carried: False)
    whole = walked(tiny, list(rows), alone="nf4+dq")
    assert second.carried.seen == whole.carried.seen
    for name, scores in whole.scores().items():
        again = second.scores()[name]
        assert torch.equal(scores.loss, again.loss) and torch.equal(scores.kl, again.kl)
