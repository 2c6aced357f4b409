"""Prompts that users have registered: one JSON file per version, of one owner, never changed.

`<prompts_dir>/<owner>/<id>.v<version>.json` is made under a hidden name and linked into place, which fails if the
version exists. A deleted version leaves an empty file of its name, so that its number is never given again and an
`id@version` never means two prompts. Ids of shipped prompts cannot be registered.
"""

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from graph.catalog import (
    Prompt,
    PromptError,
    PromptNotFoundError,
    build_prompt,
    default_catalog,
)
from graph.output_schema import SchemaError, check_enum_numbers

MAX_PROMPTS = 1000
"""Versions of one owner, deleted ones included."""
_FILE = re.compile(r"([a-z][a-z0-9_]{0,63})\.v([1-9][0-9]{0,6})\.json\Z")
_REF = re.compile(r"([a-z][a-z0-9_]{0,63})(?:@([1-9][0-9]{0,6}))?\Z")
_OWNER = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


class TooManyPromptsError(Exception):
    """The owner has as many versions as one may have."""


class UserPrompts:
    """Registered prompts under one folder. Safe from several threads and processes."""

    def __init__(self, prompts_dir: Path) -> None:
        self._dir = prompts_dir

    def create(self, owner: str, fields: dict[str, Any]) -> tuple[Prompt, bool]:
        """Register the next version of `fields["id"]`; where the newest one is the same, (that one, False).

        Args:
            fields: of a prompt, all but its version.

        Raises:
            PromptError: they are no prompt, or the id is a shipped one's.
            TooManyPromptsError
        """
        prompt = build_prompt({**fields, "version": 1})  # before the id becomes a file's name
        _check_enum_numbers(prompt)
        if default_catalog().versions(fields["id"]):
            raise PromptError("id", f"{fields['id']!r} is a prompt that Lathe ships")
        folder = self._folder(owner)
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            taken = self._files(owner)
            if len(taken) >= MAX_PROMPTS:
                raise TooManyPromptsError(owner)
            numbers = [version for prompt_id, version in taken if prompt_id == fields["id"]]
            newest = self._newest(owner, fields["id"])
            if newest is not None and newest == build_prompt({**fields, "version": newest.version}):
                return newest, False
            prompt = build_prompt({**fields, "version": max(numbers, default=0) + 1})
            if self._write(folder, prompt, fields):
                return prompt, True

    def get(self, owner: str, ref: str) -> Prompt:
        """The prompt "id@version", or the newest version of "id".

        Raises:
            PromptNotFoundError
        """
        match = _REF.match(ref)
        if match is None:
            raise PromptNotFoundError(ref)
        prompt_id, number = match.groups()
        versions = [int(number)] if number else self.versions(owner, prompt_id)[-1:]
        prompt = self._read(owner, prompt_id, versions[0]) if versions else None
        if prompt is None:
            raise PromptNotFoundError(ref)
        return prompt

    def versions(self, owner: str, prompt_id: str) -> list[int]:
        """Those that are there, ascending."""
        return sorted(v for i, v in self._files(owner, deleted=False) if i == prompt_id)

    def prompts(self, owner: str) -> list[Prompt]:
        """The newest version of every prompt, by id."""
        names = sorted({prompt_id for prompt_id, _ in self._files(owner, deleted=False)})
        newest = [self._newest(owner, name) for name in names]
        return [prompt for prompt in newest if prompt is not None]

    def delete(self, owner: str, ref: str) -> None:
        """Delete "id@version", or all versions of "id". What was written by them stays cached.

        Raises:
            PromptNotFoundError
        """
        prompt = self.get(owner, ref)
        versions = [prompt.version] if "@" in ref else self.versions(owner, prompt.id)
        for version in versions:
            os.truncate(self._path(owner, prompt.id, version), 0)

    def _write(self, folder: Path, prompt: Prompt, fields: dict[str, Any]) -> bool:
        """Store a version; False if another has taken the number."""
        hidden = folder / f".new-{secrets.token_hex(8)}"
        try:
            with hidden.open("w", encoding="utf-8") as file:
                json.dump({**fields, "version": prompt.version}, file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(hidden, folder / f"{prompt.id}.v{prompt.version}.json")
            except FileExistsError:
                return False
            return True
        finally:
            hidden.unlink(missing_ok=True)

    def _newest(self, owner: str, prompt_id: str) -> Prompt | None:
        versions = self.versions(owner, prompt_id)
        return self._read(owner, prompt_id, versions[-1]) if versions else None

    def _read(self, owner: str, prompt_id: str, version: int) -> Prompt | None:
        try:
            source = self._path(owner, prompt_id, version).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return build_prompt(json.loads(source)) if source else None

    def _files(self, owner: str, *, deleted: bool = True) -> list[tuple[str, int]]:
        folder = self._folder(owner)
        found = []
        for path in folder.iterdir() if folder.is_dir() else ():
            match = _FILE.match(path.name)
            if match is not None and (deleted or path.stat().st_size):
                found.append((match[1], int(match[2])))
        return found

    def _path(self, owner: str, prompt_id: str, version: int) -> Path:
        return self._folder(owner) / f"{prompt_id}.v{version}.json"

    def _folder(self, owner: str) -> Path:
        if not _OWNER.match(owner):
            raise ValueError(f"an owner is a key's id, got {owner[:80]!r}")
        return self._dir / owner


def _check_enum_numbers(prompt: Prompt) -> None:
    """Raises: PromptError."""
    if prompt.output["type"] == "json":
        try:
            check_enum_numbers(prompt.output["schema"])
        except SchemaError as error:
            raise PromptError("output.schema", str(error)) from error


def find_prompt(prompts: UserPrompts, owner: str, ref: str) -> Prompt:
    """A shipped prompt, or one of the owner's.

    Raises:
        PromptNotFoundError: the message tells which ids there are.
    """
    try:
        return default_catalog().get(ref)
    except PromptNotFoundError:
        pass
    try:
        return prompts.get(owner, ref)
    except PromptNotFoundError:
        ids = [prompt.id for prompt in (*default_catalog().prompts(), *prompts.prompts(owner))]
        raise PromptNotFoundError(
            f"the prompt {ref[:100]!r} does not exist; there are: {', '.join(ids)}"
        ) from None
