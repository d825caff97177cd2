"""Loss on the completion only, a truncation that keeps it, and chat templates with and without a tokenizer's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.data import Example, Turn
from agent.data.tokens import IGNORED, Tokens, encode, packed, render
from protocol.errors import BadConfig

WORDS = st.text(alphabet="abcdef gh", max_size=80)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: Any) -> Any:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHATML
    return chat


@given(prompt=WORDS, completion=WORDS, max_tokens=st.integers(8, 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_the_completion_is_learnt(tokenizer: Any, prompt: str, completion: str, max_tokens: int) -> None:
    before, after = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    ids, labels = encode(Example(b"", prompt, completion), tokenizer, max_tokens)
    assert len(ids) == len(labels) == min(len(before) + len(after), max_tokens)
    n_prompt = len(ids) - len(after) if len(ids) > len(after) else min(len(before), max_tokens // 4)
    n_prompt = max(n_prompt, min(len(before), max_tokens // 4))
    assert ids == (before[len(before) - n_prompt :] + after)[:max_tokens]
    assert labels[0] == IGNORED
    assert labels[1:] == ([IGNORED] * n_prompt + ids[n_prompt:])[1:]


def test_a_chat_template_renders_turns_and_ends_the_answer(chat_tokenizer: Any) -> None:
    example = Example(b"", (Turn("system", "s"), Turn("user", "u")), "answer")
    prompt, completion = render(example, chat_tokenizer)
    assert prompt == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "answer<|im_end|>"
    tokens = encode(example, chat_tokenizer, 1000)
    learnt = [label for label in tokens.labels if label != IGNORED]
    assert chat_tokenizer.decode(learnt) == "answer<|im_end|><eos>"


def test_without_a_template_turns_get_headings(tokenizer: Any) -> None:
    prompt, completion = render(
        Example(b"", (Turn("user", "Add."), Turn("assistant", "3"), Turn("tool", "x")), "4"), tokenizer
    )
    assert prompt == "### Instruction:\nAdd.\n\n### Response:\n3\n\n### tool:\nx\n\n### Response:\n"
    assert completion == "4"


def test_a_template_that_refuses_is_a_fault_of_the_data(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(BadConfig, match=r"refuses a conversation of roles \['user'\]: no system role"):
        render(Example(b"", (Turn("user", "u"),), "a"), strict)


def test_the_end_token_is_not_doubled(tokenizer: Any) -> None:
    ids, _ = encode(Example(b"", "p", "c<eos>"), tokenizer, 64)
    assert ids.count(tokenizer.eos_token_id) == 1


@given(st.lists(st.integers(1, 12), max_size=40))
def test_packing_keeps_order_and_cuts_nothing(lengths: list[int]) -> None:
    found = [Tokens([n] * length, [n] * length) for n, length in enumerate(lengths)]
    rows = list(packed(found, 12))
    assert [tokens for row in rows for tokens in row] == found
    assert all(0 < sum(len(tokens.ids) for tokens in row) <= 12 for row in rows)
