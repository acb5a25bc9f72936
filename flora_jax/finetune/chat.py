"""Renders a conversation as its model's chat template says, and finds what the assistant says in it.

The template sees what `transformers` shows it, and its text is encoded without further special tokens: a
template writes bos, and the end of each turn, itself.
"""

import re
from typing import Any, NamedTuple

from flora_jax.finetune.sandbox import Raised, Template
from flora_jax.finetune.tokenizer import Tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")

Messages = list[dict[str, Any]]


class Rendered(NamedTuple):
    """Is a conversation as text.

    Attributes:
      text: What the template made.
      spans: The characters that the assistant is to say, start and end of each of its turns.
      last_alone: Whether the spans leave out all answers but the last, since the template writes earlier
        ones in another way than it did when they were the last.
    """

    text: str
    spans: list[tuple[int, int]]
    last_alone: bool = False


class Chat:
    """Renders conversations by the chat template of a tokenizer.

    Raises:
      ValueError: The tokenizer has no chat template, or one whose syntax is wrong.
    """

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.template is None:
            raise ValueError(
                "the tokenizer has no chat template, which messages need; put one into "
                "chat_template.jinja beside the tokenizer, or give prompt and completion, or text"
            )
        self._template = Template(tokenizer.template)
        self._marked = bool(_GENERATION.search(tokenizer.template))
        specials = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.eos), None)}
        texts = {name: tokenizer.text_of(token) for name, token in specials.items()}
        self._variables = {name: text for name, text in texts.items() if text is not None}

    def render(self, messages: Messages, prompt: bool = False, where: str = "messages") -> str:
        """Returns the text of a conversation.

        Args:
          messages: The conversation, of `role` and `content` each.
          prompt: Whether the header of an answer that is to come is put at the end.
          where: The file and line of the conversation, for errors.

        Raises:
          ValueError: The template refuses the conversation, fails, or wants what it must not have.
        """
        return self._render(messages, prompt, where)[0]

    def answers(self, messages: Messages, where: str = "messages") -> Rendered:
        """Returns the text of a conversation and where the assistant speaks in it.

        What stands in a template's `{% generation %}` blocks is the assistant's, if it has such blocks.
        Else it is what a turn adds to the turns before it, rendered with the header of an answer: the
        content and the token that ends it. Where earlier answers are not written as they were when they
        were the last, only the last counts; a header that promises more than the answer has, such as
        `<think>`, counts from where the two differ.

        Args:
          messages: A conversation whose last turn is the assistant's.
          where: The file and line of the conversation, for errors.

        Raises:
          ValueError: As `render` does; or the last answer cannot be told from the rest.
        """
        text, marked = self._render(messages, False, where)
        if self._marked:
            spans = [(start, end) for start, end in marked if start < end]
            if not spans:
                raise ValueError(f"{where}: the chat template marks nothing as the assistant's")
            return Rendered(text, spans)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        earlier = [self._turn(messages, i, text, where) for i in turns[:-1]]
        last = self._last(messages, text, where)
        spans = [span for span in earlier if span is not None]
        return (
            Rendered(text, [*spans, last])
            if len(spans) == len(earlier)
            else Rendered(text, [last], True)
        )

    def _turn(self, messages: Messages, i: int, text: str, where: str) -> tuple[int, int] | None:
        """Returns the span of an earlier answer, if it is written as when it was the last."""
        try:
            before = self.render(messages[:i], True, where)
            through = self.render(messages[: i + 1], False, where)
        except ValueError:  # a template may refuse a beginning that has no question yet
            return None
        fits = text.startswith(through) and through.startswith(before)
        return (len(before), len(through)) if fits else None

    def _last(self, messages: Messages, text: str, where: str) -> tuple[int, int]:
        before = self.render(messages[:-1], True, where)
        if text.startswith(before):
            return len(before), len(text)
        least = self.render(messages[:-1], False, where)
        if not text.startswith(least) or not before.startswith(least):
            raise ValueError(
                f"{where}: the chat template writes what stands before the last answer in another way "
                "when the answer follows; expected the same text, or {% generation %} in the template"
            )
        pairs = zip(before, text, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(text)))
        return same, len(text)

    def _render(
        self, messages: Messages, prompt: bool, where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self._variables,
            )
        except Raised as error:
            raise ValueError(f"{where}: the chat template refuses it: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Gives an answer's reasoning the names that templates read, as `transformers` does."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}
