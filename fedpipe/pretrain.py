"""The demo's base model: a small Llama made on this machine in about two minutes, because nothing may be downloaded.

It reads public text only: the standard library's signatures and the first sentences of their docstrings (fedpipe/corpus.py),
and spelling exercises made of the same words (fedpipe/exercises.py).  So it knows what the task is and how to copy a name out
of a signature, and it knows nothing yet of the agents' packages.  That is what the federation has to add.

    tokenizer   byte-level BPE in which `reset_parameters` and "reset parameters" are the same tokens: an underscore is
                written with a space behind it, and words end where CamelCase does
    model       Llama with tied embeddings, every width a multiple of 64 (what 4-bit kernels like), wide initialisation:
                at the usual 0.02 so small a model does not learn to copy within minutes
    training    AdamW over many small batches of similar length; a token of the completion weighs 1, of the prompt less

What was measured on the way: many steps of 16 texts beat fewer of 32, a width of 128 beats 192 for the same time, and
exercises of random tokens before the text do harm.

The result is an ordinary Hugging Face folder, kept in the cache under a digest of everything that went into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fedpipe import corpus
from fedpipe.corpus import Pair
from fedpipe.exercises import spelling
from fedpipe.threads import Threads

if TYPE_CHECKING:
    import torch

FORMAT: Final = 1
"""Part of the digest: raise it when the code below makes something else from the same recipe."""

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WORDS: Final = r" ?[A-Z]?[a-z]+| ?[A-Z]+(?![a-z])|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+"

Progress = Callable[[int, int, float], None]
"""Hears (step, steps, smoothed loss)."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what the base model becomes, besides the text."""

    hidden: int = 128
    intermediate: int = 384
    n_layers: int = 4
    n_heads: int = 4
    vocabulary: int = 1024
    n_steps: int = 2000
    batch: int = 16
    max_tokens: int = 96
    learning_rate: float = 3e-3
    prompt_weight: float = 0.2
    n_pairs: int | None = None
    """Of the standard library; None takes all, some 5,600."""
    n_exercises: int = 6000
    seed: int = 0


FULL: Final = Recipe()
TINY: Final = Recipe(
    hidden=64, intermediate=128, n_layers=2, n_heads=2, vocabulary=512, n_steps=120, n_pairs=800, n_exercises=0
)
"""A base for tests: seconds, and just good enough to be improved upon."""


def base_model(progress: Progress | None = None, *, recipe: Recipe = FULL, cache: Path | None = None) -> Path:
    """Return the folder of the base model, made now if the cache does not hold it.

    The same recipe, standard library and machine give the same model.  Costs about 100 s on two cores for FULL.  The
    folder appears whole or not at all: a build that is killed leaves nothing that a later one would take for a model.
    """
    pairs = corpus.mine(corpus.STDLIB, limit=recipe.n_pairs, seed=recipe.seed)
    home = cache or cache_folder()
    final = home / f"base-{_digest(recipe, pairs)}"
    if final.is_dir():
        return final
    built = _build(recipe, pairs, progress)
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=home) as scratch:
        whole = Path(scratch) / "base"
        built.save(whole)
        try:
            whole.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was faster, and its folder is the same
                raise
    return final


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fedpipe`, by default `~/.cache/fedpipe`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpipe"


class Row(msgspec.Struct, frozen=True):
    """One tokenised pair: the first `n_prompt` ids are the prompt's, the last is the end of the text."""

    ids: list[int]
    n_prompt: int


class Built(msgspec.Struct, frozen=True):
    """A trained model with its tokenizer, both of transformers' own kind."""

    model: Any
    tokenizer: Any

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _digest(recipe: Recipe, pairs: Sequence[Pair]) -> str:
    whole = json.dumps([FORMAT, msgspec.to_builtins(recipe), pairs])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _build(recipe: Recipe, pairs: Sequence[Pair], progress: Progress | None) -> Built:
    import torch

    tokenizer = _tokenizer(pairs, recipe.vocabulary)
    lessons = [*pairs, *spelling(pairs, recipe.n_exercises, recipe.seed)]
    rows = [_row(tokenizer, pair, recipe.max_tokens) for pair in lessons]
    n_threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = _llama(recipe, tokenizer)
            _train(model, rows, recipe, progress)
    finally:
        torch.set_num_threads(n_threads)
    return Built(model, tokenizer)


def _tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Any:
    """Train the byte-level BPE (about 0.5 s) and dress it as transformers' fast tokenizer.  Decoding undoes encoding."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.normalizer = normalizers.Replace("_", "_ ")
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("_ ", "_")])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, BOS, EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _row(tokenizer: Any, pair: Pair, max_tokens: int) -> Row:
    prompt = tokenizer(pair.prompt)["input_ids"]
    whole = [*prompt, *tokenizer(pair.completion)["input_ids"], tokenizer.eos_token_id]
    return Row(whole[:max_tokens], min(len(prompt), max_tokens))


def _llama(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def _train(model: Any, rows: Sequence[Row], recipe: Recipe, progress: Progress | None) -> None:
    """Run AdamW with a short warm-up and a linear decay to zero; a step of FULL costs 0.07 s of one core, 0.045 s of two."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup, n = max(1, recipe.n_steps // 20), recipe.n_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (n - i) / (n - warmup + 1)))
    smooth = 0.0
    threads = Threads(len(os.sched_getaffinity(0)))
    model.train()
    for step, batch in enumerate(_batches(rows, recipe), start=1):
        began = time.perf_counter()
        torch.set_num_threads(threads.n)
        ids, weights = _tensors(batch, recipe.prompt_weight, model.config.pad_token_id)
        logits = model(input_ids=ids[:, :-1]).logits
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        threads.took(time.perf_counter() - began)
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if progress is not None:
            progress(step, recipe.n_steps, smooth)
    model.eval()


def _batches(rows: Sequence[Row], recipe: Recipe) -> Iterator[list[Row]]:
    """Yield n_steps batches of rows of similar length, each pass over the text in a fresh order."""
    rng = random.Random(recipe.seed)
    left = recipe.n_steps
    while left > 0:
        order = sorted(rows, key=lambda row: len(row.ids) + 8 * rng.random())  # neighbours differ from pass to pass
        cuts = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
        rng.shuffle(cuts)
        yield from cuts[:left]
        left -= len(cuts)


def _tensors(batch: Sequence[Row], prompt_weight: float, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad a batch on the right.  Returns ids and loss weights, both (rows, tokens); a pad weighs nothing."""
    import torch

    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), pad)
    weights = torch.zeros(len(batch), width)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weights[i, : row.n_prompt] = prompt_weight
        weights[i, row.n_prompt : len(row.ids)] = 1.0
    return ids, weights
