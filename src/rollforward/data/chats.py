"""A chat as the text that a model is shown, as transformers 5 renders it.

A chat template is a program in Jinja. It runs in Jinja's sandbox, with what transformers gives it: the
messages, `tools` and `documents` (None here), `add_generation_prompt`, the special tokens by name,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, `break` and `continue`, and blocks
marked as `generation`. The sandbox limits neither time nor memory: `rendering.py` does, in a process of
its own, and is the only user of this module.

A chat that ends with the assistant's turn is continued: the text ends with that turn's words, and no turn
is opened after it. Any other chat ends where the assistant's turn begins. Keys of a message whose value is
null are left out, and reasoning is available under each of its names, both as in transformers.

Two things differ from `apply_chat_template`. The date is the run's, so that a prompt stays the same on
another day, and its time is midnight. Content in parts of text is joined with spaces for a template that
reads only text (transformers does so when it serves a model, and otherwise prints the list's brackets).

Left out: tools and documents, images, and templates not named `default`.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own: a template may look at what it is given
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Chats:
    """Renders chats with one template."""

    def __init__(self, template: str, variables: Mapping[str, Any], today: datetime.date) -> None:
        """Raises Jinja's TemplateError for a bad template. `variables` are the special tokens by name."""
        self._source = template
        self._variables = dict(variables)
        self._now = datetime.datetime.combine(today, datetime.time())
        self.dated = False
        """Whether any chat rendered so far asked for the date."""
        environment = self._environment()
        self._reads_parts = _reads_parts(environment.parse(template))
        self._template = environment.from_string(template)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text. Raises ValueError when the chat does not fit, and whatever the template raises."""
        chat = [self._prepared(message) for message in messages]
        if not chat:
            raise ValueError("the chat has no messages")
        if chat[-1].get("role") != "assistant":
            return self._render(chat, add_generation_prompt=True)
        said = self._mark_end(chat[-1])
        text = self._render(chat, add_generation_prompt=False)
        if said.strip() not in text or _TAG.strip() not in text:
            raise ValueError(
                "the chat ends with a turn of the assistant, to be continued, but the template leaves "
                "(parts of) that turn out"
            )
        end = text.rindex(_TAG.strip())
        kept = text[:end]
        # A template that strips the message has stripped the tag's space: strip the text's end too.
        return kept if text.startswith(_TAG, end) else kept.rstrip()

    def _render(self, chat: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        given = {
            "messages": chat,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._template.render(**(self._variables | given))

    def _prepared(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as the template sees it."""
        found = {key: value for key, value in message.items() if value is not None}
        reasoning = next((found[name] for name in _REASONING if name in found), None)
        if reasoning is not None:
            found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
        content = found.get("content")
        if isinstance(content, list) and not self._reads_parts:
            found["content"] = _joined(content)
        return found

    def _mark_end(self, message: dict[str, Any]) -> str:
        """Append the tag to the message's text, and return that text."""
        content = message.get("content")
        if content is None or "content" not in self._source:
            raise ValueError("the chat ends with a turn of the assistant that has no content to continue")
        if isinstance(content, str):
            message["content"] = content + _TAG
            return content
        parts = content if isinstance(content, list) else []
        for index in range(len(parts) - 1, -1, -1):
            text = parts[index].get("text") if isinstance(parts[index], Mapping) else None
            if isinstance(text, str):
                marked = {**parts[index], "text": text + _TAG}
                message["content"] = [*parts[:index], marked, *parts[index + 1 :]]
                return text
        raise ValueError("the chat ends with a turn of the assistant that has no text to continue")

    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        return environment

    def _strftime_now(self, format: str) -> str:
        self.dated = True
        return self._now.strftime(format)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's words for training; here it does nothing.

    It is still a call, as in transformers: what is set in the block is not visible after it.
    """

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` with no methods but `fromkeys`."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace whose names do not begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # so that `self` may be a name in it
        self, given = args[0], dict(*args[1:], **values)
        for name in given:
            _refuse_private(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have {name!r}: it begins with an underscore")


def _reads_parts(template: nodes.Template) -> bool:
    """Whether a template can read content in parts: if so, it names the `text` of a part somewhere."""
    return any(constant.value == "text" for constant in template.find_all(nodes.Const)) or any(
        attribute.attr == "text" for attribute in template.find_all(nodes.Getattr)
    )


def _joined(parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(
                f"the content of a message has a part {str(kind)[:60]!r}, and this template reads text only"
            )
        texts.append(text)
    return " ".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which would change what the model reads.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
