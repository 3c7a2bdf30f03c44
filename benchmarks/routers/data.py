"""Outcomes of language models on public questions, for `benchmarks.routing`: reading them, pricing them, splitting them.

MMLU-Pro: prices are those of models of the same size in the price lists of RouterArena and LLMRouter, tokens are characters / 4;
DeepSeek-Coder-V2 and 32 questions with gaps are left out.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deferral.routing.table import Table

FOLDS, SEED = 5, 0


@dataclass(frozen=True)
class Data:
    """Outcomes of E experts on N queries."""

    queries: list[str]
    experts: list[str]
    quality: np.ndarray
    price: np.ndarray
    subject: np.ndarray

    def rows(self, rows: np.ndarray) -> "Data":
        """Some of the queries."""
        queries = [self.queries[row] for row in rows]
        return Data(queries, self.experts, self.quality[rows], self.price[rows], self.subject[rows])

    def table(self, rows: np.ndarray) -> Table:
        shape = (len(rows), len(self.experts))
        unknown = np.full(shape, np.nan, np.float32)
        quality = self.quality[rows].astype(np.float32)
        return Table(
            [self.queries[row] for row in rows], self.experts, quality, self.price[rows], np.ones(shape, bool), unknown, unknown
        )


def lines_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def routellm(folder: Path) -> Data:
    rows = lines_of(folder / "routellm_mmlu.jsonl.gz")
    quality = np.array([[row["mixtral_8x7b"], row["gpt4"]] for row in rows], float)
    # One call to the strong model is the unit of price: APGR counts calls.
    price = np.tile([[0.0, 1.0]], (len(rows), 1))
    return Data([r["prompt"] for r in rows], ["mixtral_8x7b", "gpt4"], quality, price, np.array([r["subject"] for r in rows]))


def llmrouter(folder: Path) -> Data:
    rows = lines_of(folder / "llmrouter_9model_train_prompts.jsonl.gz")
    with np.load(folder / "llmrouter_9model_train_outcomes.npz") as stored:
        characters = np.array([[len(row["prompt"])] for row in rows])
        price = (characters / 4 * stored["usd_per_million_in"] + 150 * stored["usd_per_million_out"]) / 1e6
        quality, names = stored["score"].astype(float), stored["models"].tolist()
    return Data([row["prompt"] for row in rows], names, quality, price, np.array([row["task"] for row in rows]))


# Dollars per million tokens in and out, by the size of the model.
_SMALL, _MIDDLE, _LARGE, _LARGEST = (0.2, 0.2), (0.6, 0.6), (0.88, 0.88), (2.0, 6.0)
_PRICES = {
    "gemini-1.5-flash-002": (0.1, 0.4), "gemini-1.5-pro-002": (1.25, 10.0), "jamba-1.5-large": _LARGEST,
    "Qwen1.5-110B": (1.2, 1.2), "Yi-34B": _MIDDLE, "c4ai-command-r-v01": _MIDDLE, "Llama-2-13b-hf": (0.3, 0.3),
    "Phi-3-mini-4k-instruct": (0.1, 0.1),
}  # fmt: skip


def _price_of(name: str) -> tuple[float, float]:
    if name in _PRICES:
        return _PRICES[name]
    if "Mixtral" in name:
        return _MIDDLE
    return _LARGE if "70" in name or "72B" in name else _SMALL


def mmlu_pro(folder: Path) -> Data:
    rows = lines_of(folder / "mmlu_pro_questions.jsonl.gz")
    texts = [f"{r['question']}\n" + "\n".join(f"{chr(65 + i)}. {o}" for i, o in enumerate(r["options"])) for r in rows]
    with np.load(folder / "mmlu_pro_outcomes.npz") as stored:
        kept = [place for place, name in enumerate(stored["models"]) if name != "DeepSeek-Coder-V2"]
        names = stored["models"][kept].tolist()
        whole = (stored["pred"][:, kept] != -2).all(1)
        quality = (stored["pred"][:, kept] == stored["answer"][:, None]).astype(float)[whole]
        output = stored["output_chars"][:, kept].astype(float)[whole] / 4
    queries = [text for text, good in zip(texts, whole, strict=True) if good]
    rates = np.array([_price_of(name) for name in names])
    price = (np.array([[len(text) / 4] for text in queries]) * rates[:, 0] + output * rates[:, 1]) / 1e6
    return Data(queries, names, quality, price, np.array([r["category"] for r, good in zip(rows, whole, strict=True) if good]))


def routerbench(folder: Path) -> Data:
    rows = lines_of(folder / "routerbench_0shot_prompts.jsonl.gz")
    with np.load(folder / "routerbench_0shot_outcomes.npz") as stored:
        quality, price, names = stored["score"].astype(float), stored["cost_usd"].astype(float), stored["models"].tolist()
    return Data([row["prompt"] for row in rows], names, quality, price, np.array([row["task"] for row in rows]))


def random_folds(rows: int) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(rows) % FOLDS


def subject_folds(subject: np.ndarray, seed: int = SEED) -> np.ndarray:
    """Whole subjects, drawn at random, a fifth of them a fold."""
    names = np.unique(subject)
    fold = dict(zip(np.random.default_rng(seed).permutation(names), np.arange(len(names)) % FOLDS, strict=True))
    return np.array([fold[name] for name in subject])
