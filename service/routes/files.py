"""Files: what jobs read. A file belongs to the key that uploaded it; admins see all."""

from typing import Annotated, Literal

import anyio
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError

from jobs.file_check import FileContentError, check_file
from jobs.files import (
    FileInfo,
    Order,
    Purpose,
    QuotaExceededError,
    Upload,
    UploadConflictError,
    UploadInUseError,
    UploadNotFoundError,
    UploadPurpose,
    files_in_use,
)
from service.auth import Identity
from service.deps import (
    AppState,
    IdempotencyKey,
    IdentityDep,
    RequestModel,
    ResponseModel,
    StateDep,
    require,
    standalone_schema,
)
from service.errors import ApiError, error_responses
from service.idempotency import request_hash, resource_id
from service.multipart import Form, receive_form

router = APIRouter(
    prefix="/v1/files",
    tags=["files"],
    dependencies=[Depends(require("jobs"))],
    responses=error_responses(409, 507),
)
MIN_LIFETIME_SECONDS, MAX_LIFETIME_SECONDS = 3600, 30 * 24 * 3600


class FileUpload(RequestModel):
    """A file and what it is for: JSON lines, or for `calibration` also Parquet with a column `text`."""

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    purpose: UploadPurpose
    anchor: Literal["created_at"] | None = Field(default=None, alias="expires_after[anchor]")
    seconds: int | None = Field(
        default=None,
        alias="expires_after[seconds]",
        ge=MIN_LIFETIME_SECONDS,
        le=MAX_LIFETIME_SECONDS,
        strict=False,  # a form has texts only
    )


class FileObject(ResponseModel):
    """OpenAI's file object, with the content's sha256."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    sha256: str


class FileList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(ResponseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def _file(info: FileInfo) -> FileObject:
    return FileObject(
        id=info.id,
        bytes=info.num_bytes,
        created_at=int(info.created_at),
        expires_at=None if info.expires_at is None else int(info.expires_at),
        filename=info.filename,
        purpose=info.purpose,
        sha256=info.sha256,
    )


def _not_found(error: UploadNotFoundError, param: str) -> ApiError:
    return ApiError("file_not_found", str(error), param)


_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": standalone_schema(FileUpload)}},
    }
}


@router.post("", status_code=201, openapi_extra=_CREATE_BODY)
async def create_file(
    request: Request,
    response: Response,
    state: StateDep,
    identity: IdentityDep,
    key: IdempotencyKey = None,
) -> FileObject:
    """Upload a file. Its content is checked in full before the 201; a refusal names the line at fault."""
    await anyio.to_thread.run_sync(state.files.purge, lambda: files_in_use(state.jobs))
    with await anyio.to_thread.run_sync(state.files.begin) as upload:
        form = await receive_form(request, "file", upload.write)
        filename, fields = _checked(form)
        info, created = await anyio.to_thread.run_sync(
            _add, state, identity, upload, filename, fields, key
        )
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return _file(info)


def _checked(form: Form) -> tuple[str, FileUpload]:
    """Raises: ApiError."""
    if form.filename is None:
        raise ApiError("invalid_value", "part 'file' must be a file", "file")
    try:
        fields = FileUpload.model_validate({**form.fields, "file": form.filename})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        unknown = first["type"] == "extra_forbidden"
        raise ApiError(
            "unsupported_parameter" if unknown else "invalid_value",
            "this part is not known here" if unknown else first["msg"],
            str(first["loc"][0]),
        ) from None
    if (fields.anchor is None) != (fields.seconds is None):
        raise ApiError("invalid_value", "anchor and seconds go together", "expires_after")
    return form.filename, fields


def _add(
    state: AppState,
    identity: Identity,
    upload: Upload,
    filename: str,
    fields: FileUpload,
    key: str | None,
) -> tuple[FileInfo, bool]:
    digest = upload.finish()
    most = None if state.quotas is None else state.quotas.max_file_bytes(identity.tenant)
    try:
        check_file(upload.path, fields.purpose)
        return state.files.add(
            upload,
            file_id=resource_id("file", identity, key),
            owner=identity.tenant,
            filename=filename,
            purpose=fields.purpose,
            request_hash=request_hash([filename, fields.purpose, fields.seconds, digest]),
            max_owner_bytes=most,
            lifetime_seconds=fields.seconds,
        )
    except FileContentError as error:
        raise ApiError("invalid_file", str(error), "file") from None
    except QuotaExceededError as error:
        message = f"{error} beside your graphs, jobs, projectors and models"
        raise ApiError("insufficient_quota", message, "file") from None
    except UploadConflictError:
        raise ApiError(
            "idempotency_conflict",
            "this Idempotency-Key was used with another upload",
            "Idempotency-Key",
        ) from None


@router.get("")
async def list_files(
    state: StateDep,
    identity: IdentityDep,
    after: Annotated[
        str | None, Query(max_length=100, description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """Files, by age."""

    def query() -> list[FileInfo]:
        return state.files.list_files(
            identity.sees, purpose=purpose, after=after, limit=limit + 1, order=order
        )

    try:
        found = await anyio.to_thread.run_sync(query)
    except UploadNotFoundError as error:
        raise _not_found(error, "after") from None
    data = [_file(info) for info in found[:limit]]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


async def _find(file_id: str, state: AppState, identity: Identity) -> FileInfo:
    try:
        return await anyio.to_thread.run_sync(state.files.get, file_id, identity.sees)
    except UploadNotFoundError as error:
        raise _not_found(error, "file_id") from None


@router.get("/{file_id}")
async def get_file(file_id: str, state: StateDep, identity: IdentityDep) -> FileObject:
    return _file(await _find(file_id, state, identity))


@router.get("/{file_id}/content", response_class=FileResponse)
async def get_file_content(file_id: str, state: StateDep, identity: IdentityDep) -> FileResponse:
    """The file's bytes, as they were uploaded."""
    info = await _find(file_id, state, identity)
    return FileResponse(
        state.files.path(info), media_type="application/octet-stream", filename=info.filename
    )


@router.delete("/{file_id}")
async def delete_file(file_id: str, state: StateDep, identity: IdentityDep) -> FileDeleted:
    """Delete a file. Refused while a job that has not ended needs it."""
    try:
        await anyio.to_thread.run_sync(
            state.files.delete, file_id, identity.sees, lambda: files_in_use(state.jobs)
        )
    except UploadNotFoundError as error:
        raise _not_found(error, "file_id") from None
    except UploadInUseError as error:
        raise ApiError("file_in_use", str(error), "file_id") from None
    return FileDeleted(id=file_id)
