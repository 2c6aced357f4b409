"""Structured output: which tokens may come next so that a text stays in its language, by llguidance (MIT).

A constraint is checked in the API process, so that what cannot be enforced is a 400 before any token, and compiled
beside the engine's loop. llguidance counts its work and stops by itself where a schema or a step asks for too much;
nothing is fetched, and a keyword that it cannot enforce is an error. Whitespace between JSON tokens is at most one
space, since a small model given the choice may write nothing else.

Imports no torch; llguidance is imported when it is used.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.protocol import Constraint, EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CONSTRAINT_CHARS = 65536
MAX_CACHED = 32
MAX_REASON_CHARS = 400
PARAMS = {
    "json_schema": "response_format.json_schema",
    "json_object": "response_format",
    "regex": "regex",
}
"""The request field that a constraint of a kind comes from."""


class UnkeptConstraintError(ValueError):
    """No next token keeps to the constraint, or finding one asks for too much work: the request's own fault."""


def check_constraint(constraint: Constraint) -> None:
    """Take milliseconds to find out whether a constraint can be enforced.

    Raises:
        EngineError: "invalid_value": too large, malformed, or with something that cannot be enforced.
    """
    from llguidance import LLMatcher

    message = LLMatcher.validate_grammar(_grammar(constraint), limits=_limits())
    if message and not message.startswith("WARNING"):
        raise _refusal(constraint, message)


def _grammar(constraint: Constraint) -> str:
    """Raises: EngineError: too large, or no JSON."""
    from llguidance import LLMatcher

    if len(constraint.text) > MAX_CONSTRAINT_CHARS:
        size = f"{len(constraint.text)} characters, allowed are {MAX_CONSTRAINT_CHARS}"
        raise _refusal(constraint, size)
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    schema = '{"type": "object"}' if constraint.kind == "json_object" else constraint.text
    try:
        json.loads(schema)
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": "[ ]?"})
    except (ValueError, RecursionError) as error:
        raise _refusal(constraint, str(error)) from None


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _refusal(constraint: Constraint, message: str) -> EngineError:
    param = PARAMS[constraint.kind]
    reason = message.strip()[:MAX_REASON_CHARS]  # it may quote the whole expression
    return EngineError("invalid_value", f"{param} cannot be enforced: {reason}", param)


class TokenMatcher:
    """Where one text stands in its language."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size,): which tokens may come next; EOS only where the text may end.

        Raises:
            UnkeptConstraintError: the step asks for too much work.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise self._failure()
        allowed: NDArray[np.bool_] = np.unpackbits(bits, bitorder="little")[: self._vocab_size] > 0
        return allowed

    def take(self, token_id: int) -> None:
        """Raises: UnkeptConstraintError: no token of the vocabulary can spell what must follow."""
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    def _failure(self) -> UnkeptConstraintError:
        reason = self._matcher.get_error().partition("\n")[0][:MAX_REASON_CHARS]
        return UnkeptConstraintError(f"the output's constraint cannot be kept: {reason}")

    @property
    def is_finished(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()


class ConstraintCompiler:
    """Compiles constraints for one tokenizer, in a thread of its own; equal ones once."""

    def __init__(self, tokenizer: "LLTokenizer") -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="constraints")

    @classmethod
    def load(
        cls, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> "ConstraintCompiler | str":
        """The compiler of a tokenizer.json, or why there is none.

        Args:
            vocab_size: of the model's logits.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            return "llguidance is not installed"
        try:
            return cls(
                LLTokenizer(
                    str(tokenizer), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None
                )
            )
        except ValueError as error:
            return f"llguidance does not take {tokenizer.name}: {error}"

    def submit(self, constraint: Constraint) -> "Future[TokenMatcher]":
        """The matcher of a new text; an `EngineError` where there is none."""
        return self._executor.submit(self._compile, constraint)

    def _compile(self, constraint: Constraint) -> TokenMatcher:
        from llguidance import LLMatcher

        matcher = self._compiled.get(constraint)
        if matcher is None:
            matcher = LLMatcher(
                self._tokenizer, _grammar(constraint), log_level=0, limits=_limits()
            )
            if matcher.is_error():
                raise _refusal(constraint, matcher.get_error())
            self._compiled[constraint] = matcher
        self._compiled.move_to_end(constraint)
        if len(self._compiled) > MAX_CACHED:
            self._compiled.popitem(last=False)
        return TokenMatcher(matcher.deep_copy(), self._tokenizer.vocab_size)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
