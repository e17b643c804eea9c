"""Conversations as token ids, of which only the assistant's answers are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, shown
from lowdim.train.conversations import Turn

__all__ = [
    "IGNORED",
    "PLAIN_TEMPLATE",
    "Encoded",
    "NoAnswerLeftError",
    "encode_conversation",
    "ending_of",
    "prompt_of",
    "token_ids",
    "use_template",
]

#: Label of a token that is not trained on.
IGNORED = -100
#: For tokenizers without a chat template: a turn begins with its role on a line of its own, an answer ends with the end token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it.

    Attributes:
        input_ids: of the whole conversation.
        labels: the ids of the answers, `IGNORED` elsewhere.
        cut: number of tokens that were cut off at the start.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0


class NoAnswerLeftError(DataError):
    """A conversation has no whole answer within the length."""


def use_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the plain one; returns whether it has the plain one.

    A tokenizer that begins texts with a token of its own gets it in the template, too. The template is saved with the
    tokenizer, so the trained model is used with the template that it was trained with.

    Raises:
        DataError: the tokenizer has no token that ends a text, so that an answer would have no end.
    """
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE)
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has neither a chat template nor an end token, so answers would not end; give it one")
    begins = tokenizer.bos_token is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
    return True


def ending_of(tokenizer: Any) -> str:
    """What the template writes after an answer, such as `<|im_end|>`; line breaks at its end are not part of it."""
    word = "answer"
    whole = _rendered(tokenizer, [Turn("user", "question"), Turn("assistant", word)], "a conversation")
    return whole.rpartition(word)[2].rstrip("\n")


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Of a text that a template has written: the names of special tokens in it are those tokens."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"])


def prompt_of(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The text after which the model is to write the answer to the last of the user's turns."""
    messages = [turn.to_dict() for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_conversation(tokenizer: Any, turns: Sequence[Turn], length: int, place: str = "") -> Encoded:
    """Token ids and labels of a conversation.

    Every answer is trained on, with the token that ends it: the text between the template's invitation to answer and the end of
    the turn. A conversation that is too long loses tokens at its start; an answer that is not left whole is not trained on.

    Raises:
        DataError: the template fails, or drops or changes an answer.
        NoAnswerLeftError: no whole answer is left within the length.
    """
    spans, whole = _answers(tokenizer, turns, place)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    cut = max(0, len(ids) - length)
    labels = [IGNORED] * len(ids)
    here = 0
    for start, end in spans:
        while here < len(ids) and offsets[here][1] <= start:
            here += 1
        first = here
        while here < len(ids) and offsets[here][0] < end:
            here += 1
        if first > cut or not cut:  # the token before the answer is left, so that all of it is predicted
            labels[first:here] = ids[first:here]
    ids, labels = ids[cut:], labels[cut:]
    if all(label == IGNORED for label in labels[1:]):
        raise NoAnswerLeftError(f"{place}: no whole answer is left in {length} tokens (--max-length)")
    return Encoded(ids, labels, cut)


def _answers(tokenizer: Any, turns: Sequence[Turn], place: str) -> tuple[list[tuple[int, int]], str]:
    """Where the answers stand in the text of the whole conversation, and that text."""
    whole = _rendered(tokenizer, turns, place)
    spans = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _rendered(tokenizer, turns[:index], place, invite=True)
        after = _rendered(tokenizer, turns[: index + 1], place)
        if not whole.startswith(before) or not whole.startswith(after.rstrip("\n")):
            raise DataError(
                f"{place}: the tokenizer's chat template writes answer {len(spans) + 1} otherwise in the whole conversation "
                "than on its own (some templates drop earlier answers' reasoning), so it cannot be told apart; "
                "keep the last answer only"
            )
        if turn.content.strip() not in whole[len(before) : len(after)]:
            raise DataError(
                f"{place}: the tokenizer's chat template drops the answer {shown(turn.content)}; nothing would be trained"
            )
        spans.append((len(before), len(after.rstrip("\n"))))  # with the token that ends the turn, without its line break
    return spans, whole


def _rendered(tokenizer: Any, turns: Sequence[Turn], place: str, *, invite: bool = False) -> str:
    import jinja2

    messages = [turn.to_dict() for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=invite))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{place}: the tokenizer's chat template does not take this conversation ({reason})") from None
