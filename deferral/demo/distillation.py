"""Training the two language models of the demo: the large one on answers, the small one on the large one's distributions."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral.demo.language import END
from deferral.demo.questions import Question

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["LARGE", "SMALL", "Recipe", "train"]

_IGNORED = -100
_WARM_UP = 30


@dataclass(frozen=True)
class Recipe:
    """A model's size and training."""

    width: int
    layers: int
    heads: int
    steps: int
    batch: int
    learning_rate: float


LARGE = Recipe(width=192, layers=4, heads=4, steps=500, batch=64, learning_rate=2e-3)
SMALL = Recipe(width=64, layers=2, heads=4, steps=180, batch=64, learning_rate=5e-3)


def train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    questions: list[Question],
    recipe: Recipe,
    on_step: Callable[[], None],
    *,
    teacher: "LlamaForCausalLM | None" = None,
    seed: int = 0,
) -> None:
    """AdamW on the tokens of the answers: cross-entropy, and with a teacher half of it its Kullback-Leibler divergence.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), at temperature 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    steps = recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / _WARM_UP, 1 - step / steps))
    model.train()
    batches = _batches(tokenizer, questions, recipe.batch, seed)
    for _ in range(steps):
        tokens, targets = next(batches)
        answered = targets != _IGNORED
        scores = _scores(model, tokens, answered)
        loss = F.cross_entropy(scores, targets[answered])
        if teacher is not None:
            with torch.no_grad():
                soft = _scores(teacher, tokens, answered).log_softmax(-1)
            loss = (loss + F.kl_div(scores.log_softmax(-1), soft, log_target=True, reduction="batchmean")) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step()
    model.eval()


def _scores(model: "LlamaForCausalLM", tokens: Tensor, rows: Tensor) -> Tensor:
    # Only where an answer is written: the vocabulary's scores of the other tokens would be a third of the work.
    return model.lm_head(model.model(tokens).last_hidden_state[rows])


def _batches(
    tokenizer: "PreTrainedTokenizerFast", questions: list[Question], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, L), and at each place the token that comes next if it is one of the answer, without end."""
    prompts = tokenizer([f"<|user|>{question.text}<|assistant|>" for question in questions])["input_ids"]
    answers = tokenizer([question.answer + END for question in questions])["input_ids"]
    draw = random.Random(seed)
    by_kind: dict[str, list[int]] = {}
    for row, question in enumerate(questions):
        by_kind.setdefault(question.kind, []).append(row)
    kinds = list(by_kind.values())
    while True:
        # Some kinds have few questions: every kind is as frequent as the others.
        rows = [draw.choice(kinds[place % len(kinds)]) for place in range(size)]
        longest = max(len(prompts[row]) + len(answers[row]) for row in rows)
        tokens = torch.zeros(size, longest, dtype=torch.long)
        targets = torch.full((size, longest), _IGNORED)
        for place, row in enumerate(rows):
            prompt, answer = prompts[row], answers[row]
            tokens[place, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            targets[place, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
        yield tokens, targets
