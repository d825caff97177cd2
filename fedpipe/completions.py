"""A few prompts that nobody trained on, completed by the base and by the base with the adapter, as a user would load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.data import DataConfig, Example
from agent.data import split as splitting
from fedpipe.outcome import Sample

N_NEW_TOKENS = 32


def held_out(data: DataConfig, seed: int, ratio: float) -> list[Example]:
    """The agent's held-out examples, in their own fixed order."""
    parts = splitting.load(data, seed, ratio)
    return sorted(parts.held_out, key=lambda example: example.key)


def complete(base: Path, adapter: Path, data: Mapping[str, DataConfig], seed: int, ratio: float) -> list[Sample]:
    """One sample per agent, at most three: prompt, what the text says, base's and adapter's greedy completion."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from agent.data.tokens import prompt_ids, render
    from agent.evaluation import greedy
    from agent.loading import quiet

    quiet()
    firsts = {agent: held_out(config, seed, ratio) for agent, config in list(data.items())[:3]}
    chosen = {agent: found[0] for agent, found in firsts.items() if found}
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [render(example, tokenizer) for example in chosen.values()]
    prompts = [prompt_ids(prompt, tokenizer, is_templated=False) for prompt, _ in texts]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = greedy(model, tokenizer, prompts, N_NEW_TOKENS)
    after = greedy(PeftModel.from_pretrained(model, adapter).eval(), tokenizer, prompts, N_NEW_TOKENS)
    return [
        Sample(agent=agent, prompt=prompt, reference=reference.strip(), before=b.strip(), after=a.strip())
        for agent, (prompt, reference), b, a in zip(chosen, texts, before, after, strict=True)
    ]
