"""Structured output: what is written parses and validates, and what cannot be enforced is refused by name."""

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from engines import structured
from engines.engine import NativeEngine
from engines.protocol import Constraint, EngineError, SamplingParams
from engines.structured import ConstraintCompiler, TokenMatcher, check_constraint
from tests.engines.decoding import GREEDY, build_request, run, run_one, token_ids_of
from tests.engines.models import SIZES, build_from_config, write_checkpoint

pytestmark = pytest.mark.usefixtures("single_thread")

WORDS = [
    "<unk>", "<s>", "</s>", *'{}[]",:0123456789abcdefghijklmnopqrstuvwxyz-.\\',
    "\u0120", '{"', '":', "ab", "12", ',\u0120"',
]  # fmt: skip
"""In the byte-level alphabet of GPT-2, where a space is U+0120."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> NativeEngine:
    return load_json_engine(tmp_path_factory.mktemp("json"))


def load_json_engine(folder: Path) -> NativeEngine:
    """A random model over the characters of JSON."""
    from tokenizers import Tokenizer, decoders, models

    words = list(dict.fromkeys(WORDS))
    sizes = SIZES | {"vocab_size": len(words) + 3, "eos_token_id": 2}  # three padded logits
    folder = write_checkpoint(build_from_config(LlamaConfig(**sizes)), folder)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=False))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return NativeEngine.load("json", folder, dtype=torch.float32)


def _text(outputs: list[Any]) -> str:
    words = list(dict.fromkeys(WORDS))
    ids = token_ids_of(outputs)
    if outputs[-1].stop_token_id is not None:
        ids = ids[:-1]
    return "".join(words[token_id] for token_id in ids).replace("\u0120", " ")


def _requests(constraint: Constraint, num: int, max_tokens: int = 200) -> list[Any]:
    params = SamplingParams(max_tokens=max_tokens, temperature=1.5)
    return [
        build_request(
            f"r{i}", [3, 4, 5 + i], dataclasses.replace(params, seed=i), constraint=constraint
        )
        for i in range(num)
    ]


def test_a_schema_is_kept_by_a_random_model(engine: NativeEngine) -> None:
    constraint = Constraint(kind="json_schema", text=json.dumps(SCHEMA))
    texts = set()
    for outputs in run(engine, _requests(constraint, 20)).values():
        assert outputs[-1].finish_reason == "stop"
        value = json.loads(_text(outputs))
        assert value.keys() == {"name", "age", "tags", "ok"}
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 6
        assert type(value["age"]) is int
        assert 0 <= value["age"] <= 99
        assert set(value["tags"]) <= {"x", "y"}
        assert len(value["tags"]) <= 3
        assert type(value["ok"]) is bool
        texts.add(_text(outputs))
    assert len(texts) > 10


def test_an_object_is_an_object(engine: NativeEngine) -> None:
    finished = 0
    for outputs in run(engine, _requests(Constraint(kind="json_object"), 12)).values():
        if outputs[-1].finish_reason == "stop":
            assert isinstance(json.loads(_text(outputs)), dict)
            finished += 1
    assert finished > 3


def test_a_regex_matches_whole(engine: NativeEngine) -> None:
    pattern = r"(ab|x{2,4})-[0-9]{3}(true|false)?"
    for outputs in run(engine, _requests(Constraint(kind="regex", text=pattern), 12)).values():
        assert outputs[-1].finish_reason == "stop"
        assert re.fullmatch(pattern, _text(outputs))
    # "true" may follow "xx-123", but nothing may follow it: the text ends there without an EOS
    forced = Constraint(kind="regex", text="xx-123true")
    outputs = run_one(engine, build_request("f", [3], GREEDY, constraint=forced))
    assert (_text(outputs), outputs[-1].stop_token_id) == ("xx-123true", None)


def test_a_vocabulary_that_cannot_spell_the_text_costs_the_request_only(
    engine: NativeEngine,
) -> None:
    """No token of the model holds the letter A."""
    bad = build_request("bad", [3], GREEDY, constraint=Constraint(kind="regex", text="xA"))
    outputs = run(engine, [bad, build_request("free", [3], GREEDY)])
    assert outputs["bad"][-1].error_code == "invalid_value"
    assert "constraint" in (outputs["bad"][-1].error or "")
    assert outputs["free"][-1].error is None


def test_company_is_not_constrained(engine: NativeEngine) -> None:
    free = build_request("free", [3, 4, 5], GREEDY)
    expected = token_ids_of(run_one(engine, free))
    outputs = run(engine, [*_requests(Constraint(kind="json_object"), 3, 20), free])
    assert token_ids_of(outputs["free"]) == expected


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint(kind="json_schema", text='{"type": "nope"}'), "Invalid type: nope"),
        (Constraint(kind="json_schema", text='{"not": {"type": "string"}}'), "not"),
        (Constraint(kind="json_schema", text='{"$ref": "http://example.com/x"}'), "does not fetch"),
        (Constraint(kind="json_schema", text="{"), "Expecting property name"),
        (Constraint(kind="json_schema", text="[" * 60000), "recursion"),
        (Constraint(kind="regex", text="("), "unclosed group"),
        (Constraint(kind="regex", text="(?=x)a"), "look-ahead"),
        (Constraint(kind="regex", text="a" * 70000), "70000 characters, allowed are 65536"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    engine: NativeEngine, constraint: Constraint, message: str
) -> None:
    """By the check before it is sent, and by the engine for those who did not check."""
    with pytest.raises(EngineError, match=message) as caught:
        check_constraint(constraint)
    assert caught.value.code == "invalid_value"
    assert caught.value.param == structured.PARAMS[constraint.kind]
    (output,) = run_one(engine, build_request("r", [3], GREEDY, constraint=constraint))
    assert (output.finish_reason, output.error_code) == ("error", "invalid_value")


def test_good_constraints_pass_the_check() -> None:
    for constraint in (
        Constraint(kind="json_object"),
        Constraint(kind="json_schema", text=json.dumps(SCHEMA)),
        Constraint(kind="regex", text="[a-z]+"),
    ):
        check_constraint(constraint)


def test_what_contradicts_a_constraint_is_refused(engine: NativeEngine) -> None:
    for field in ({"ignore_eos": True}, {"min_tokens": 2}):
        params = dataclasses.replace(GREEDY, **field)
        request = build_request("r", [3], params, constraint=Constraint(kind="json_object"))
        with pytest.raises(EngineError) as caught:
            engine.submit(request)
        assert caught.value.param == next(iter(field))


class _SlowCompiler:
    """Compiles when told to."""

    def __init__(self) -> None:
        self.future: Future[TokenMatcher] = Future()

    def submit(self, constraint: Constraint) -> "Future[TokenMatcher]":
        return self.future


def test_others_go_on_while_a_constraint_is_compiled(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = _SlowCompiler()
    monkeypatch.setattr(engine, "_compiler", slow)
    constraint = Constraint(kind="regex", text="x")
    engine.submit(build_request("waits", [3], GREEDY, constraint=constraint))
    assert engine.stats().num_requests_waiting == 1
    engine.submit(build_request("free", [3], dataclasses.replace(GREEDY, ignore_eos=True)))
    outputs = []
    for _ in range(GREEDY.max_tokens):
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"free"}
    assert outputs[-1].finish_reason == "length"
    timer = threading.Timer(0.05, slow.future.set_exception, [EngineError("invalid_value", "no")])
    timer.start()
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    timer.join()
    assert [(output.request_id, output.error) for output in outputs] == [("waits", "no")]


def test_a_compilation_has_a_deadline_and_can_be_aborted(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines import engine as engine_module

    slow = _SlowCompiler()
    monkeypatch.setattr(engine, "_compiler", slow)
    constraint = Constraint(kind="regex", text="x")
    engine.submit(build_request("gone", [3], GREEDY, constraint=constraint))
    engine.abort("gone")
    assert slow.future.cancelled()
    assert not engine.has_work()
    slow.future = Future()
    monkeypatch.setattr(engine_module, "COMPILE_SECONDS", -1.0)
    engine.submit(build_request("late", [3], GREEDY, constraint=constraint))
    (output,) = engine.step()
    assert "not compiled after" in (output.error or "")
    assert not engine.has_work()


def test_an_unknown_kind_of_tokenizer_leaves_structured_output_out(
    decoder_checkpoint: Callable[[str], Path],
) -> None:
    folder = decoder_checkpoint("llama")  # of whole words, without a decoder
    engine = NativeEngine.load("words", folder, dtype=torch.float32)
    assert engine.info.unsupported == ("response_format", "regex")
    with pytest.raises(EngineError) as caught:
        engine.submit(build_request("r", [3], constraint=Constraint(kind="regex", text="a")))
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "regex")


def test_equal_constraints_are_compiled_once(engine: NativeEngine) -> None:
    assert isinstance(engine._compiler, ConstraintCompiler)
    compiler = ConstraintCompiler(engine._compiler._tokenizer)
    first, second = (
        compiler.submit(Constraint(kind="regex", text="ab|xy")).result() for _ in range(2)
    )
    assert len(compiler._compiled) == 1
    before = second.allowed()
    first.take(int(before.argmax()))
    assert (second.allowed() == before).all()
    compiler.close()


@pytest.mark.real_model
def test_the_real_model_answers_in_json(real_model_dir: Path) -> None:
    from tokenizers import Tokenizer

    engine = NativeEngine.load("smollm2-135m", real_model_dir)
    assert engine.info.unsupported == ()
    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    prompt = tokenizer.encode("A record of the city of Paris as JSON: ").ids
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    constraint = Constraint(kind="json_schema", text=json.dumps(schema))
    params = SamplingParams(max_tokens=60, temperature=0)
    outputs = run_one(engine, build_request("r", prompt, params, constraint=constraint))
    assert outputs[-1].finish_reason == "stop"
    value = json.loads(tokenizer.decode(token_ids_of(outputs)))
    assert value["city"] == "Paris"
    assert type(value["people"]) is int
