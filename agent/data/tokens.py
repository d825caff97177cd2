"""Examples -> token ids and labels, with the loss on the completion only.

    [beginning] prompt completion end        labels: -100 over the prompt, the token itself over completion and end

Prompt and completion are tokenized apart, because at inference the prompt stands alone too: no token straddles the border.

Truncation to max_tokens keeps the completion: the prompt loses its beginning first (down to a quarter of max_tokens),
only then the completion its end.  The very first token is never a target: nothing stands before it, and in a packed row that
would be the end of another example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import jinja2

from agent.data import Example, Turn
from protocol.errors import BadConfig

IGNORED: Final = -100
"""Label without loss, by the convention of torch's cross entropy."""

HEADINGS: Final = {"system": "### System:", "user": "### Instruction:", "assistant": "### Response:"}


class Tokens(NamedTuple):
    """One tokenized example.  Both lists have the same length, at most max_tokens."""

    ids: list[int]
    labels: list[int]

    @property
    def n_targets(self) -> int:
        """How many tokens carry loss."""
        return len(self.labels) - self.labels.count(IGNORED)


def encode(example: Example, tokenizer: Any, max_tokens: int) -> Tokens:
    """Tokenize and truncate.  `tokenizer` is a transformers tokenizer."""
    prompt, completion = render(example, tokenizer)
    chat = not isinstance(example.prompt, str) and bool(tokenizer.chat_template)
    before = prompt_ids(prompt, tokenizer, is_templated=chat)
    after: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
        after = [*after, tokenizer.eos_token_id]
    room = max(max_tokens - len(after), min(len(before), max_tokens // 4))
    before = before[len(before) - room :] if room < len(before) else before
    after = after[: max_tokens - len(before)]
    labels = [IGNORED] * len(before) + after
    return Tokens([*before, *after], [IGNORED, *labels[1:]])


def prompt_ids(prompt: str, tokenizer: Any, *, is_templated: bool) -> list[int]:
    """Ids of a prompt with the tokenizer's own beginning but without its end; a chat template brings its beginning along."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=not is_templated)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, tokenizer.bos_token_id}
    return ids[:-1] if not is_templated and ids and ids[-1] in ends else ids


def render(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The texts of prompt and completion; turns go through the tokenizer's chat template, or ours if it has none."""
    if isinstance(example.prompt, str):
        return example.prompt, example.completion
    if not tokenizer.chat_template:
        parts = [f"{HEADINGS.get(turn.role, f'### {turn.role}:')}\n{turn.content}\n\n" for turn in example.prompt]
        return f"{''.join(parts)}{HEADINGS['assistant']}\n", example.completion
    prompt = _template(example.prompt, tokenizer, ask=True)
    whole = _template((*example.prompt, Turn("assistant", example.completion)), tokenizer, ask=False)
    # A template may rewrite earlier turns once an answer follows; then the answer's own text has to do.
    completion = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else example.completion
    return prompt, completion


def _template(turns: Sequence[Turn], tokenizer: Any, *, ask: bool) -> str:
    conversation = [turn._asdict() for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)
    except (jinja2.TemplateError, ValueError) as error:
        roles = [turn.role for turn in turns]
        raise BadConfig(f"the base model's chat template refuses a conversation of roles {roles}: {error}") from None
    return text


def packed(found: Iterable[Tokens], max_tokens: int) -> Iterator[list[Tokens]]:
    """Rows of whole examples that together fit max_tokens, in order; an example is never cut to fill a row."""
    row: list[Tokens] = []
    room = max_tokens
    for tokens in found:
        if row and len(tokens.ids) > room:
            yield row
            row, room = [], max_tokens
        row.append(tokens)
        room -= len(tokens.ids)
    if row:
        yield row
