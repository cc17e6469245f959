"""Conversations rendered as text by a tokenizer's chat template, with the spans to be learned.

    {"messages": [{"role": …, "content": …}, …]}    the assistant's messages are learned
    {"prompt": …, "completion": …}                  the completion is learned; both texts, or both lists of messages

A record becomes a text and spans of its characters. The template is the tokenizer's own, in Jinja: chat_template.jinja beside
tokenizer.json, else a key of tokenizer_config.json. If it marks the assistant's messages (`{% generation %}`), these are the
spans. Otherwise they are found by rendering beginnings of the conversation: the answer of turn i lies between the end of the
first i messages with the prompt for an answer and the end of the first i + 1 messages. If a template changes earlier messages,
for example to leave out former reasoning, only answers that are also in the whole text are learned.

Texts of prompt and completion need no template. They end with the token that ends a text, which is learned.

Ids and marks are stored together while a text is tokenized: `id + COUNTS` for a token of a span, `id + BEGINS` for the first.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingDependency
from ..words import few
from .readers import Item
from .tokenizers import ByteTokenizer, Tokenizer

COUNTS, BEGINS = 1 << 30, 1 << 31  # added to an id
ID = COUNTS - 1  # the bits of the id
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters that mark the ends of a span while a template is rendered
ANSWER = "assistant"  # the role whose messages are learned
Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character, and the one after the last


class Unrendered(Exception):
    """Raised if a template refuses a conversation; its text says why."""


@dataclass(frozen=True)
class Template:
    """A chat template, and the special tokens that it may name."""

    text: str
    tokens: tuple[tuple[str, str], ...] = ()

    @cached_property
    def _compiled(self) -> Any:
        try:
            from jinja2 import TemplateError, nodes
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as e:
            raise MissingDependency("data.source: chat: needs jinja2: pip install 'questctl[data]'.") from e

        class Generation(Extension):
            tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

            def _marked(self, caller: Any) -> str:
                return f"{OPEN}{caller()}{CLOSE}"

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.text)
        except TemplateError as e:
            raise DataError(f"data.tokenizer: its chat template cannot be read: {e}.") from e

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """The text of messages, with `prompt` up to where an answer begins. Raises Unrendered."""
        template = self._compiled
        try:
            text: str = template.render(messages=messages, add_generation_prompt=prompt, tools=None, **dict(self.tokens))
        except Exception as e:  # a template may raise anything
            raise Unrendered(str(e).splitlines()[0] if str(e) else type(e).__name__) from e
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text, "tokens": self.tokens}


def template_of(jinja: bytes | None, config: bytes | None) -> Template | None:
    """The template of chat_template.jinja and tokenizer_config.json; None if neither has one."""
    try:
        values = json.loads(config) if config else {}
    except ValueError:
        values = {}
    text = jinja.decode() if jinja else values.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}.get("default")
    if not isinstance(text, str) or not text:
        return None
    named = ((key, v.get("content") if isinstance(v, dict) else v) for key, v in values.items() if key.endswith("_token"))
    return Template(text, tuple((key, token) for key, token in named if isinstance(token, str)))


def rendered(record: Any, template: Template | None, where: str, needs: str) -> Item:
    """A record → JSON of [text, spans, whether the end of a text follows], or the error that says what is wrong with it.

    `needs` says what to do without a template. Raises DataError with it.
    """
    fields = record if isinstance(record, Mapping) else {}
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            return DataError(f"data.source: {where}: has an empty completion.")
        return _item(prompt + completion, [(len(prompt), len(prompt) + len(completion))], end=True)
    messages, first = _messages(fields.get("messages")), 0  # the first message that may be learned
    if (asked := _messages(prompt)) and (answered := _messages(completion)):
        messages, first = [*asked, *answered], len(asked)
    if not messages:
        has = few(list(fields)) or "none"
        return DataError(
            f"data.source: {where}: has neither 'messages', a list of role and content, nor 'prompt' and 'completion'; its "
            f"fields: {has}."
        )
    if template is None:
        raise DataError(needs)
    try:
        text, spans = _conversation(template, messages, first)
    except Unrendered as e:
        return DataError(f"data.source: {where}: the chat template does not take it ({e}).")
    if not spans:
        return DataError(f"data.source: {where}: the assistant says nothing in it, so that nothing could be learned.")
    return _item(text, spans, end=False)


def _messages(value: Any) -> list[Mapping[str, Any]]:
    """The messages if `value` is a list of messages, else none."""
    messages = value if isinstance(value, list) else []
    whole = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    return messages if whole else []


def _item(text: str, spans: list[Span], *, end: bool) -> str:
    return json.dumps([text, spans, end], ensure_ascii=True)


def _conversation(template: Template, messages: Messages, first: int) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans of the assistant's messages from message `first` on."""
    if re.search(r"\{%-?\s*generation\b", template.text):
        return _between_marks(template.render(messages), sum(m["role"] == ANSWER for m in messages[:first]))
    text, spans = template.render(messages), []
    for i, message in enumerate(messages):
        if message["role"] != ANSWER or i < first:
            continue
        try:
            before, through = template.render(messages[:i], prompt=True), template.render(messages[: i + 1])
        except Unrendered:
            continue
        if through.startswith(before) and text.startswith(through):
            spans.append((len(before), len(through)))
    return text, [span for span in spans if span[0] < span[1]]


def _between_marks(text: str, skipped: int) -> tuple[str, list[Span]]:
    """A text with the marks of spans → the text without the marks, and the spans except the first `skipped`."""
    spans, plain, start = list[Span](), list[str](), 0
    at = 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            start = at
        elif piece == CLOSE:
            spans.append((start, at))
        else:
            plain.append(piece)
            at += len(piece)
    return "".join(plain), [span for span in spans[skipped:] if span[0] < span[1]]


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer of the records that `rendered` returns; marks are added to the ids."""

    tokenizer: Tokenizer
    template: Template | None

    @property
    def name(self) -> str:
        """The name of the tokenizer."""
        return self.tokenizer.name

    @property
    def vocab_size(self) -> int:
        """An upper bound of the ids with their marks."""
        return 1 << 32

    @property
    def end(self) -> int:
        """The id after each conversation, which is not learned."""
        return self.tokenizer.end

    @property
    def hash(self) -> str:
        """The SHA-256 (hex) of tokenizer and template."""
        about = [self.tokenizer.hash, self.template and [self.template.text, self.template.tokens]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The ids of a rendered record with their marks, (n,) uint32."""
        plain, spans, end = json.loads(text)
        if isinstance(self.tokenizer, ByteTokenizer):
            ids = self.tokenizer.encode(plain).astype(np.uint32)
            starts = np.repeat(np.arange(len(plain)), [len(c.encode()) for c in plain]).tolist()
        else:
            encoding = self._library.encode(plain, add_special_tokens=False)
            ids, starts = np.array(encoding.ids, np.uint32), [start for start, _ in encoding.offsets]
        opens, closes = [a for a, _ in spans], [b for _, b in spans]
        learned = [(k := bisect_right(opens, start)) > 0 and start < closes[k - 1] for start in starts]
        out = ids + np.array(learned, np.uint32) * np.uint32(COUNTS)
        if end:
            out = np.append(out, np.uint32(self.end + COUNTS))
        if len(out):
            out[0] = (out[0] & ID) + BEGINS
        return out.astype(np.uint32)

    def decode(self, ids: Any) -> str:
        """The text of ids (n,) without marks."""
        return self.tokenizer.decode(ids)

    @cached_property
    def _library(self) -> Any:
        """The library's tokenizer, which reads the special tokens that a template writes."""
        from .tokenizers import TableTokenizer, library_of

        assert isinstance(self.tokenizer, TableTokenizer)
        return library_of(self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "template": self.template}
