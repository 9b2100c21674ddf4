"""Messages: what requests and answers hold, in the shape of OpenAI's interface.

What is not done is refused by name: a server that takes no notice of a setting answers another
question than it was asked.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
# As many as OpenAI takes.
Stops = Annotated[list[Text], Field(max_length=4)]


class Asked(BaseModel):
    """What every request has."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    # Whoever sends it is told nothing by it, and nothing is kept of it.
    user: str | None = None


class Generated(Asked):
    """What is asked of a text, whatever it goes on from.

    Answers are greedy: the likeliest token is taken, so that an answer is the same in any batch.
    """

    stop: Text | Stops | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @model_validator(mode="after")
    def _greedy_alone(self) -> "Generated":
        only = {
            "temperature": (0.0, None),
            "top_p": (1.0, None),
            "n": (1, None),
            "presence_penalty": (0.0, None),
            "frequency_penalty": (0.0, None),
        }
        for name, values in only.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(
                    f"{name} must be {values[0]:g} or left out, got {value:g}: answers are greedy"
                )
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionAsked(Generated):
    """The body of a request to go on from prompts."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class ChatAsked(Generated):
    """The body of a request to answer a conversation."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most_tokens(self) -> int:
        """How many tokens the answer may have."""
        return self.max_completion_tokens or self.max_tokens or 256

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The turns, as chat templates take them."""
        return [turn.model_dump() for turn in self.messages]


class ClassifyAsked(Asked):
    """The body of a request to label rows of a known task, or prompts with options."""

    rows: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    task: str | None = None
    prompts: Annotated[list[Text], Field(min_length=1)] | None = None
    options: Annotated[list[Text], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "ClassifyAsked":
        if (self.rows is None) == (self.prompts is None):
            raise ValueError("give rows of a task that the router knows, or prompts with options")
        if (self.prompts is None) != (self.options is None):
            raise ValueError("prompts and options go together; rows take their task's own options")
        if self.prompts is not None and self.task is not None:
            raise ValueError("task goes with rows; prompts are asked as they are")
        return self


def failure(message: str, status: int, code: str) -> dict[str, Any]:
    """Returns the body of a refusal."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code or None}}


def usage(n_prompt: int, n_generated: int) -> dict[str, int]:
    """Returns the tokens of a request."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
    }
