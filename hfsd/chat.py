"""Conversations in a model's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfsd.errors import BadRequest
from hfsd.records import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def asked(example: Example) -> list[Message]:
    """The turns that an answer follows: those before, and the prompt."""
    return [*example.history, {"role": "user", "content": example.prompt}]


def conversation(example: Example) -> list[Message]:
    """An example as the conversation that a model is trained on."""
    return [*asked(example), {"role": "assistant", "content": example.reference}]


def single_turn(prompt: str) -> list[Message]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that asks for the next assistant turn, in the model's own chat template.

    A template that has no system role gets the system text at the head of the user turn. A tokenizer without a template
    gets the messages as paragraphs: that is how a base model is prompted.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(m["content"] for m in messages) + "\n\n"
    return _templated(tokenizer, messages, ask=True)


def transcript(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text of a whole conversation, as `render` writes it, with nothing asked at its end."""
    if not tokenizer.chat_template:
        return "\n\n".join(m["content"] for m in messages)
    return _templated(tokenizer, messages, ask=False)


def answer_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a conversation in the chat template, and of the answer that follows it (no end-of-turn token)."""
    head = tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    return head, tokenizer(answer, add_special_tokens=False)["input_ids"]


def trainable(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answer: str) -> dict[str, Any]:
    """A row for TRL: `prompt` and `completion` as messages that the template shows whole.

    TRL hands messages to the template as they are, which loses a system turn where the template has none: it is folded
    here as `render` folds it. Without a template both are plain texts.
    """
    if not tokenizer.chat_template:
        return {"prompt": render(tokenizer, prompt), "completion": answer}
    return {
        "prompt": _fitted(tokenizer, prompt, ask=True)[0],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str:
    return _fitted(tokenizer, messages, ask)[1]


def _fitted(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> tuple[list[Message], str]:
    """The messages as the template takes them, its system turn folded where it has none, and the text."""
    text = _apply(tokenizer, messages, ask)
    first = messages[0]
    if first["role"] == "system" and len(messages) > 1 and (text is None or first["content"].strip() not in text):
        folded = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{"role": messages[1]["role"], "content": folded}, *messages[2:]]
        text = _apply(tokenizer, messages, ask)
    if text is None:
        roles = ", ".join(m["role"] for m in messages)
        raise BadRequest(f"the model's chat template refuses the turns {roles}; fix chat_template in its tokenizer")
    return messages, text


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str | None:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except jinja2.TemplateError:
        return None
