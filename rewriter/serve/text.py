"""Text in and out: the folder's tokenizer and chat template, and text made token by token."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from rewriter.errors import RewriterError

#: What a decoder makes of bytes that are not yet, or never will be, a character.
UNFINISHED = "\ufffd"


class Text:
    """tokenizer.json and the chat template of a folder, read without transformers.

    Raises RewriterError: the folder has no tokenizer.json, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise RewriterError(
                f"{folder} has no tokenizer.json", "put the model's fast tokenizer there"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            settings = folder / "tokenizer_config.json"
            self.settings = json.loads(settings.read_text()) if settings.is_file() else {}
            template = folder / "chat_template.jinja"
            named = template.read_text() if template.is_file() else None
        except Exception as error:  # tokenizers raises Exception itself
            raise RewriterError(f"cannot read the tokenizer of {folder}: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.template: str = named or self.settings.get("chat_template") or ""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; with the special tokens that the tokenizer puts around a text, or without."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation and of the beginning of an answer.

        Raises RewriterError: the folder has no template, or the template refuses the messages.
        """
        if not self.template:
            raise RewriterError(
                "this model has no chat template", "use /v1/completions with a prompt"
            )
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {n: _content(self.settings[n]) for n in names if self.settings.get(n)}
        try:
            text = self._compiled.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RewriterError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, special=False)

    @cached_property
    def _compiled(self) -> Any:
        """The template, with what transformers gives templates."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.template)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class Writer:
    """Text of one answer as its tokens come, up to the first stop string.

    Characters of several tokens are held back until they are whole, and what may be the beginning
    of a stop string until it is known not to be one; all pieces together are the text of all
    tokens, cut before the stop string.
    """

    def __init__(self, text: Text, stops: list[str]) -> None:
        self.text, self.stops = text, stops
        self.tokens: list[int] = []
        self.start = self.read = 0  # tokens before `read` are written, the context is from `start`
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be written now; '' if nothing."""
        self.tokens.append(token)
        return self._emit(self._fresh(whole=True))

    def finish(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        made = self._emit(self._fresh(whole=False))
        made, self.held = made + self.held, ""
        return made

    def _fresh(self, whole: bool) -> str:
        """Text of the tokens not yet written, in the context of a few before them."""
        before = self.text.decode(self.tokens[self.start : self.read])
        now = self.text.decode(self.tokens[self.start :])
        if len(now) <= len(before) or (whole and now.endswith(UNFINISHED)):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return now[len(before) :]

    def _emit(self, fresh: str) -> str:
        if not self.stops or not fresh:
            return fresh
        self.held += fresh
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            made, self.held, self.stopped = self.held[: min(found)], "", True
            return made
        keep = max(_overlap(self.held, stop) for stop in self.stops)
        made, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return made


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
