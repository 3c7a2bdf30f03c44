"""Tiny language models: a Llama made from a configuration, its tokenizer, and answers of several questions at once.

A model's folder holds config.json, model.safetensors and the tokenizer's files, as `transformers` writes and reads them.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deferral.errors import installing
from deferral.torchvision_compat import import_torchvision

try:
    # transformers imports torchvision where there is one, and cannot be imported where that one is broken.
    if find_spec("torchvision"):
        import_torchvision()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar
except ModuleNotFoundError as error:
    raise ImportError(f"the language models need {error.name}: {installing('gateway-demo')}") from error

__all__ = ["END", "ROLES", "LanguageModel", "Sampling", "Step", "TooLong", "make_tokenizer", "new_model"]

END = "<|end|>"
ROLES = ("system", "user", "assistant")
VOCABULARY = 512
WINDOW = 128
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# Renamed in transformers 5.
_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn: at temperature 0 each token is the likeliest one."""

    most_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0
    alternatives: int = 0  # how many of the likeliest tokens are told, with every token


@dataclass(frozen=True)
class Step:
    """One token of an answer, with the logarithm of its probability; the last has `finish`: "stop" (no token) or "length"."""

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()
    finish: str | None = None


class TooLong(ValueError):
    """A prompt that leaves no room for an answer."""


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of the texts in which every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.chat_template = CHAT
    return wrapped


def new_model(*, width: int, layers: int, heads: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


class LanguageModel:
    """A model with its tokenizer, ready to answer."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(cls, folder: Path) -> "LanguageModel":
        """The model that was saved there."""
        disable_progress_bar()
        return cls(LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder))

    def save(self, folder: Path) -> None:
        """Write the files of the model and of the tokenizer."""
        disable_progress_bar()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def parameters(self) -> int:
        """How many numbers it has learned."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of a chat up to the answer's first; TooLong if no room is left for it."""
        tokens: list[int] = self.tokenizer.encode(
            "".join(f"<|{message['role']}|>{message['content']}" for message in messages) + "<|assistant|>",
            add_special_tokens=False,
        )
        if len(tokens) >= WINDOW:
            raise TooLong(f"the prompt has {len(tokens)} tokens; the context window is {WINDOW}, the answer included")
        return tokens

    def answers(self, questions: Sequence[str]) -> list[str]:
        """The likeliest answer of every question."""
        prompts = [self.prompt([{"role": "user", "content": question}]) for question in questions]
        texts = [""] * len(prompts)
        for row, step in self.steps(prompts, [Sampling()] * len(prompts)):
            texts[row] += step.text
        return texts

    @torch.inference_mode()
    def steps(self, prompts: Sequence[list[int]], sampling: Sequence[Sampling]) -> Iterator[tuple[int, Step]]:
        """Answer the prompts side by side: (row, step) of every row that is not finished, token after token."""
        longest = max(map(len, prompts))
        # Padded on the left: the next token of every row is in the same column.
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        generators = [torch.Generator().manual_seed(each.seed) for each in sampling]
        room = [min(each.most_tokens, WINDOW - len(prompt)) for each, prompt in zip(sampling, prompts, strict=True)]
        waiting, cache, count = set(range(len(prompts))), {_CACHE: DynamicCache(config=self.model.config)}, 0
        while waiting:
            # The cache is filled in place.
            reply = self.model(tokens, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1, **cache)
            logprobs, count = reply.logits[:, -1].log_softmax(-1), count + 1
            chosen = logprobs.argmax(-1)
            for row in sorted(waiting):
                if sampling[row].temperature > 0:
                    chosen[row] = _drawn(logprobs[row], sampling[row].temperature, generators[row])
                step = self._step(logprobs[row], int(chosen[row]), sampling[row].alternatives, last=count >= room[row])
                if step.finish:
                    waiting.discard(row)
                yield row, step
            tokens, position = chosen.unsqueeze(-1), position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)

    def _step(self, logprobs: Tensor, token: int, alternatives: int, *, last: bool) -> Step:
        ranked = logprobs.topk(alternatives) if alternatives else None
        others = (
            () if ranked is None else tuple(zip(map(self._text, ranked.indices.tolist()), ranked.values.tolist(), strict=True))
        )
        if token == self.model.config.eos_token_id:
            return Step("", float(logprobs[token]), others, "stop")
        return Step(self._text(token), float(logprobs[token]), others, "length" if last else None)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _drawn(logprobs: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    return torch.multinomial((logprobs / temperature).softmax(-1), 1, generator=generator)[0]
