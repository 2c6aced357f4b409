"""The prompt catalog, to read."""

from typing import Any, Literal

from fastapi import APIRouter, Depends

from graph.catalog import Prompt, default_catalog
from service.deps import ResponseModel, require
from service.enrichment import find_prompt
from service.errors import error_responses

router = APIRouter(
    prefix="/v1/prompts",
    tags=["graphs"],
    dependencies=[Depends(require("inference"))],
    responses=error_responses(),
)


class PromptMessage(ResponseModel):
    role: str
    content: str


class PromptObject(ResponseModel):
    """One version of a prompt. `{text}` and `{neighbors}` stand for a node's; `hash` is of what shapes an answer."""

    id: str
    object: Literal["prompt"] = "prompt"
    version: int
    versions: list[int]
    kind: str
    description: str
    inputs: list[str]
    max_tokens: int
    max_text_tokens: int
    max_neighbors: int
    max_neighbor_tokens: int
    output: dict[str, Any]
    messages: list[PromptMessage]
    hash: str


class PromptList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[PromptObject]


def _prompt(prompt: Prompt) -> PromptObject:
    return PromptObject(
        id=prompt.id,
        version=prompt.version,
        versions=default_catalog().versions(prompt.id),
        kind=prompt.kind,
        description=prompt.description,
        inputs=list(prompt.inputs),
        max_tokens=prompt.max_tokens,
        max_text_tokens=prompt.max_text_tokens,
        max_neighbors=prompt.max_neighbors,
        max_neighbor_tokens=prompt.max_neighbor_tokens,
        output=prompt.output,
        messages=[PromptMessage(**message) for message in prompt.messages],
        hash=prompt.hash,
    )


@router.get("")
async def list_prompts() -> PromptList:
    """The newest version of every prompt."""
    return PromptList(data=[_prompt(prompt) for prompt in default_catalog().prompts()])


@router.get("/{prompt_id}")
async def get_prompt(prompt_id: str) -> PromptObject:
    """A prompt by id (the newest version) or `id@version`."""
    return _prompt(find_prompt(prompt_id))
