"""What a request may hold, and what an error looks like, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: Options that would change the answer in a way that this server does not know, and the values
#: that ask for nothing. Everything else that is unknown is ignored, as by other servers.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}


class RequestError(Exception):
    """An answer that is an error: its HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.error = {"message": message, "type": kind, "param": param, "code": code}


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Asked(BaseModel):
    """What both endpoints take. return_token_ids is vLLM's: the answer's tokens beside its text."""

    model_config = ConfigDict(strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Part(BaseModel):
    """One piece of a message; `type` other than text is refused."""

    type: str
    text: str = ""


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """For a chat template: content as one string, `system` for the newer `developer`."""
        content = self.content
        if isinstance(content, list):
            if other := [p.type for p in content if p.type != "text"]:
                raise RequestError(400, f"messages may hold text, not {other[0]}", param="messages")
            content = "".join(p.text for p in content)
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content or ""}


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Asked):
    """prompt: text or token ids, or a list of one of them."""

    prompt: str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=1)]

    def one(self) -> str | list[int]:
        first = self.prompt[0] if isinstance(self.prompt, list) and self.prompt else self.prompt
        return first if isinstance(first, (str, list)) else self.prompt  # type: ignore[return-value]


Kind = TypeVar("Kind", bound=Asked)


def parse(kind: type[Kind], body: Any, model: str) -> Kind:
    """Raises RequestError: something is missing, of a wrong type or size, or unsupported."""
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    for name, neutral in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise RequestError(400, f"{name} is not supported by this server", param=name)
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(400, f"{place}: {first['msg']}", param=param) from None
    if asked.model != model:
        raise RequestError(
            404,
            f"there is no model '{asked.model}'; this server has '{model}'",
            param="model",
            code="model_not_found",
        )
    return asked
