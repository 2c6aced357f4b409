"""The prompt catalog: what Lathe ships, and prompts of one's own."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import Field

from engines.protocol import EngineError
from graph.catalog import (
    MAX_ANSWER_TOKENS,
    MAX_NEIGHBORS_READ,
    MAX_PROMPT_TOKENS,
    PROMPT_ID_PATTERN,
    Prompt,
    PromptError,
    PromptNotFoundError,
    build_prompt,
    default_catalog,
)
from graph.generation import constraint_of
from graph.user_prompts import MAX_PROMPTS, TooManyPromptsError, UserPrompts
from service.auth import Identity
from service.deps import AppState, IdentityDep, RequestModel, ResponseModel, StateDep, require
from service.enrichment import find_prompt
from service.errors import ApiError, error_responses

router = APIRouter(
    prefix="/v1/prompts",
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(),
)
MAX_MESSAGE_CHARS = 20_000
Name = Annotated[str, Field(max_length=64)]


class PromptMessage(RequestModel):
    role: Literal["system", "user"]
    content: str = Field(min_length=1, max_length=MAX_MESSAGE_CHARS)


class TextOutput(RequestModel):
    type: Literal["text"]


class JsonOutput(RequestModel):
    """`schema` is a closed object with bounded strings and arrays. `text` lists the fields that are encoded, `label`
    names the one that holds the chosen class."""

    type: Literal["json"]
    schema_: dict[str, Any] = Field(alias="schema")
    text: list[Name] = Field(max_length=16)
    label: Name | None = None


class PromptBody(RequestModel):
    """A new version of a prompt. A place `{name}` in a message is filled with the input of that name, and must stand
    between `<name>` and `</name>`. Inputs are text, neighbors, neighbor_labels and classes, which come from the node
    and its graph, and variables of any other name, which an enrichment gives."""

    id: str = Field(pattern=PROMPT_ID_PATTERN)
    kind: str = Field(default="custom", min_length=1, max_length=64)
    description: str = Field(default="", max_length=1000)
    inputs: list[Name] = Field(default=["text"], min_length=1, max_length=16)
    defaults: dict[Name, Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)]] = Field(default={})
    max_tokens: int = Field(ge=1, le=MAX_ANSWER_TOKENS)
    max_text_tokens: int = Field(default=1024, ge=1, le=MAX_PROMPT_TOKENS)
    max_neighbors: int = Field(default=0, ge=0, le=MAX_NEIGHBORS_READ)
    max_neighbor_tokens: int = Field(default=0, ge=0, le=MAX_PROMPT_TOKENS)
    output: Annotated[TextOutput | JsonOutput, Field(discriminator="type")]
    messages: list[PromptMessage] = Field(min_length=1, max_length=8)


class PromptMessageObject(ResponseModel):
    role: str
    content: str


class PromptObject(ResponseModel):
    """One version of a prompt. `{name}` in a message stands for an input; `hash` is of what shapes an answer."""

    id: str
    object: Literal["prompt"] = "prompt"
    version: int
    versions: list[int]
    shipped: bool = Field(description="Part of Lathe; false for your own.")
    kind: str
    description: str
    inputs: list[str]
    variables: list[str] = Field(description="Inputs that a request gives by name.")
    defaults: dict[str, str]
    max_tokens: int
    max_text_tokens: int
    max_neighbors: int
    max_neighbor_tokens: int
    output: dict[str, Any]
    messages: list[PromptMessageObject]
    hash: str


class PromptList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[PromptObject]


class PromptDeleted(ResponseModel):
    id: str
    object: Literal["prompt"] = "prompt"
    deleted: Literal[True] = True


@router.get("")
async def list_prompts(state: StateDep, identity: IdentityDep) -> PromptList:
    """The newest version of every prompt: those of Lathe, then your own."""

    def objects() -> list[PromptObject]:
        prompts = [*default_catalog().prompts(), *_own(state).prompts(identity.tenant)]
        return [_prompt_object(prompt, state, identity) for prompt in prompts]

    return PromptList(data=await asyncio.to_thread(objects))


@router.post("", status_code=201)
async def create_prompt(
    body: PromptBody, response: Response, state: StateDep, identity: IdentityDep
) -> PromptObject:
    """Register a prompt of your own, or its next version. A version never changes: what you post again as it is, you
    get back."""
    fields = body.model_dump(by_alias=True, exclude_none=True)
    if not fields["defaults"]:
        del fields["defaults"]
    try:
        await asyncio.to_thread(_check_schema, build_prompt({**fields, "version": 1}))
        prompt, created = await asyncio.to_thread(_own(state).create, identity.tenant, fields)
    except PromptError as error:
        raise ApiError("invalid_value", error.message, error.param) from error
    except TooManyPromptsError:
        raise ApiError(
            "insufficient_quota", f"a key registers at most {MAX_PROMPTS} versions"
        ) from None
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return _prompt_object(prompt, state, identity)


@router.get("/{prompt_id}")
async def get_prompt(prompt_id: str, state: StateDep, identity: IdentityDep) -> PromptObject:
    """A prompt by id (the newest version) or `id@version`."""
    prompt = await asyncio.to_thread(find_prompt, prompt_id, state, identity, "prompt_id")
    return _prompt_object(prompt, state, identity)


@router.delete("/{prompt_id}")
async def delete_prompt(prompt_id: str, state: StateDep, identity: IdentityDep) -> PromptDeleted:
    """Delete a prompt of your own: `id@version`, or all versions of an id. Their numbers are not given again."""
    try:
        await asyncio.to_thread(_own(state).delete, identity.tenant, prompt_id)
    except PromptNotFoundError:
        shipped = find_prompt(prompt_id, state, identity, "prompt_id")
        raise ApiError(
            "invalid_value", f"{shipped.ref} is part of Lathe and cannot be deleted", "prompt_id"
        ) from None
    return PromptDeleted(id=prompt_id)


def _check_schema(prompt: Prompt) -> None:
    """Raises: PromptError: an engine could not keep answers to it."""
    from engines.structured import check_constraint

    constraint = constraint_of(prompt, ("one", "another"))
    if constraint is None:
        return
    try:
        check_constraint(constraint)
    except EngineError as error:
        raise PromptError("output.schema", error.message) from error


def _own(state: AppState) -> UserPrompts:
    return UserPrompts(state.settings.prompts_dir)


def _prompt_object(prompt: Prompt, state: AppState, identity: Identity) -> PromptObject:
    shipped = default_catalog().versions(prompt.id)
    return PromptObject(
        id=prompt.id,
        version=prompt.version,
        versions=shipped or _own(state).versions(identity.tenant, prompt.id),
        shipped=bool(shipped),
        kind=prompt.kind,
        description=prompt.description,
        inputs=list(prompt.inputs),
        variables=list(prompt.variables),
        defaults=prompt.defaults,
        max_tokens=prompt.max_tokens,
        max_text_tokens=prompt.max_text_tokens,
        max_neighbors=prompt.max_neighbors,
        max_neighbor_tokens=prompt.max_neighbor_tokens,
        output=prompt.output,
        messages=[PromptMessageObject(**message) for message in prompt.messages],
        hash=prompt.hash,
    )
