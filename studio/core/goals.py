"""What people fine-tune for, in plain words, and what might serve instead."""

from dataclasses import dataclass
from typing import Literal

Goal = Literal["style", "task", "domain", "facts", "text"]


@dataclass(frozen=True, slots=True)
class GoalWords:
    """One goal.

    Attributes:
        label: The goal in a few words.
        example: What somebody with this goal would say.
        rank: The rank to begin with.
        rank_reason: Why that rank.
        instead: What might serve without training, with its source.
        fits: Whether fine-tuning is the right tool for it.
    """

    label: str
    example: str
    rank: int
    rank_reason: str
    instead: str
    fits: bool = True


GOALS: dict[Goal, GoalWords] = {
    "style": GoalWords(
        "A style or format",
        "answer like our support team; always in this JSON form",
        16,
        "a style is little to learn: rank 16 holds it",
        "Try a system prompt with three to five examples first: it costs an hour and often does. Fine-tune when the "
        "prompt grows long, the format still breaks, or a smaller model is to do it. About a thousand good rows are "
        "enough (Zhou et al. 2023, LIMA).",
    ),
    "task": GoalWords(
        "One narrow task",
        "classify tickets; turn a question into a shell command",
        16,
        "one task on some thousand rows: rank 16 holds it",
        "Put ten examples into a prompt and measure that first: it is the baseline that a fine-tune has to beat. For "
        "narrow tasks it usually does: over 31 tasks 4-bit LoRA gained 34 points on average over its base (Zhao et al. "
        "2024, LoRA Land).",
    ),
    "domain": GoalWords(
        "The language of a field",
        "read and write case law, medical notes, our code base",
        64,
        "much text to take in: a wider adapter",
        "This wants much text: millions of tokens. LoRA takes in less of it than full fine-tuning and forgets less of "
        "what the model knew (Biderman et al. 2024, LoRA Learns Less and Forgets Less). With a few documents, "
        "retrieval does better.",
    ),
    "facts": GoalWords(
        "Facts it should know",
        "our products, prices, people; answers from a handbook",
        32,
        "facts are many bits: a wider adapter, though see the note",
        "Retrieval fits facts better than fine-tuning: put the passages that matter into the prompt. It answered more "
        "questions right, on new facts and on old ones (Ovadia et al. 2023, Fine-Tuning or Retrieval?), and training "
        "on facts that are new to a model makes it invent more (Gekhman et al. 2024). Fine-tune to make it use the "
        "passages well, not to make it remember them.",
        fits=False,
    ),
    "text": GoalWords(
        "Continue pre-training",
        "take in raw text: a language, a field's papers, our code",
        128,
        "raw text is much to take in: a wide adapter",
        "This changes what a model knows of a language or a field, not how it answers: train answers after it. LoRA "
        "takes in less than full fine-tuning and forgets less (Biderman et al. 2024, LoRA Learns Less and Forgets "
        "Less). Some general text mixed in (data.sources) keeps more of what it knew (Ibrahim et al. 2024, Simple and "
        "Scalable Strategies to Continually Pre-train Large Language Models).",
    ),
}
"""Every goal, in the order in which screens offer it."""
