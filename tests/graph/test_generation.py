"""JSON answers: constrained, repaired once, free of label statements; and no label of a node that is not trained on
gets into a prompt."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.protocol import Constraint, GenerateRequest
from graph.catalog import Message, Prompt, default_catalog
from graph.enrich_types import (
    EnrichBudget,
    EnrichNode,
    EnrichRequest,
    EnrichResult,
    UnsuitableModelError,
)
from graph.generation import (
    InvalidAnswerError,
    PromptInputError,
    Written,
    answer_prompt,
    check_inputs,
    constraint_of,
    parse_answer,
    strip_label_statements,
    training_classes,
    training_labels,
)
from graph.nodes import NodeInputError, classes_of_graph, nodes_of_graph
from graph.store import Graph, GraphStore
from tests.graph.fakes import ScriptedEngine, own_text
from tests.graph.graphs import OWNER, columns, create
from tests.graph.test_catalog import all_prompts
from tests.graph.test_enrich import House, statuses

CLASSES = ("Neural_Networks", "Theory", "Case_Based")


def summary(text: str) -> str:
    return json.dumps({"summary": text})


async def enrich(
    house: House, prompt: str, nodes: Sequence[EnrichNode] = (), **options: Any
) -> EnrichResult:
    return await house.enricher.enrich(
        EnrichRequest(
            nodes=tuple(nodes) or (EnrichNode(id="n", text="abc"),),
            prompt=default_catalog().get(prompt),
            model="writer",
            embedding_model="encoder",
            outputs=frozenset({"text", "embedding"}),
            **options,
        )
    )


# Answers


@pytest.mark.anyio
async def test_a_json_answer(tmp_path: Path) -> None:
    house = House(tmp_path, ScriptedEngine(lambda prompt: summary(own_text(prompt).upper())))
    row = (await enrich(house, "summary@2")).rows[0]
    assert (row.status, row.text, row.fields) == ("ok", "ABC", {"summary": "ABC"})
    assert (row.label, row.repaired, row.embedding_source) == (None, False, "enriched")
    (request,) = house.writer.requests
    assert request.constraint is not None
    assert request.constraint.kind == "json_schema"
    schema = json.loads(request.constraint.text)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["summary"]
    assert (1, *map(ord, "abc\nABC"), 2) in house.encoder.embedded
    again = (await enrich(house, "summary@2")).rows[0]
    assert (again.status, again.fields, again.text) == ("cached", {"summary": "ABC"}, "ABC")
    assert len(house.writer.requests) == 1


class Twice:
    """Answers the first time, and otherwise when asked to repair."""

    def __init__(self, first: str, second: str) -> None:
        self.answers = [first, second]

    def __call__(self, prompt: str) -> str:
        assert ("This is no valid answer" in prompt) == (len(self.answers) == 1)
        return self.answers.pop(0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "broken", ['{"summary": "a long te', "no JSON", "[]", '{"summary": ""}', '{"other": "a"}', ""]
)
async def test_an_invalid_answer_is_repaired_once(tmp_path: Path, broken: str) -> None:
    house = House(tmp_path, ScriptedEngine(Twice(broken, summary("short"))))
    result = await enrich(house, "summary@2")
    row = result.rows[0]
    assert (row.status, row.text, row.repaired) == ("ok", "short", True)
    first, second = house.writer.prompts
    assert second.startswith(first)
    assert f"[assistant]{broken}" in second
    assert row.tokens_in == len(first) + len(second) == result.usage.prompt_tokens
    assert row.tokens_out == len(broken) + len(summary("short")) == result.usage.completion_tokens
    lengths = [_longest(request) for request in house.writer.requests]
    assert lengths == [480, 240]
    again = (await enrich(house, "summary@2")).rows[0]
    assert (again.status, again.repaired) == ("cached", True)


def _longest(request: GenerateRequest) -> int:
    assert request.constraint is not None
    length: int = json.loads(request.constraint.text)["properties"]["summary"]["maxLength"]
    return length


@pytest.mark.anyio
async def test_what_stays_invalid_gets_the_raw_feature(tmp_path: Path) -> None:
    house = House(tmp_path, ScriptedEngine(Twice('{"summary": "a', '{"summary"')))
    row = (await enrich(house, "summary@2")).rows[0]
    assert (row.status, row.text, row.fields) == ("invalid_output", None, None)
    assert row.error is not None
    assert (row.error.code, row.error.message) == ("invalid_output", "it is not complete JSON")
    assert (row.embedding_source, row.repaired) == ("raw", False)
    assert house.encoder.embedded == [(1, *map(ord, "abc"), 2)]
    assert (await enrich(house, "summary@2")).rows[0].status == "invalid_output"
    assert len(house.writer.requests) == 2  # greedy decoding would write the same again


@pytest.mark.anyio
async def test_an_answer_cut_by_max_tokens(tmp_path: Path) -> None:
    """The scripted engine does not keep to the constraint, so that max_tokens cuts it."""
    house = House(tmp_path, ScriptedEngine(lambda prompt: summary("x" * 400)))
    row = (await enrich(house, "summary@2", max_tokens=40)).rows[0]
    assert (row.status, row.finish_reason, row.tokens_out) == ("invalid_output", "length", 80)
    # fewer tokens than the prompt allows: shorter strings from the start
    assert [_longest(request) for request in house.writer.requests] == [120, 60]


@pytest.mark.anyio
async def test_a_repair_that_does_not_fit_is_not_tried(tmp_path: Path) -> None:
    prompt = default_catalog().get("summary@2")
    length = sum(len(f"[{m['role']}]{m['content']}") for m in prompt.fill("abc"))
    writer = ScriptedEngine(
        lambda prompt: '{"summary": "a', max_model_len=length + prompt.max_tokens + 20
    )
    house = House(tmp_path, writer)
    assert statuses(await enrich(house, "summary@2")) == ["invalid_output"]
    assert len(house.writer.requests) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("spare", [-1, 0])
async def test_a_token_budget_has_room_for_the_repair(tmp_path: Path, spare: int) -> None:
    prompt = default_catalog().get("summary@2")
    length = sum(len(f"[{m['role']}]{m['content']}") for m in prompt.fill("abc"))
    most = 2 * length + 3 * prompt.max_tokens + 256
    house = House(tmp_path, ScriptedEngine(Twice("{", summary("b"))))
    result = await enrich(house, "summary@2", budget=EnrichBudget(tokens=most + spare))
    assert statuses(result) == (["ok"] if spare == 0 else ["skipped_budget"])
    assert result.usage.total_tokens <= most


@pytest.mark.anyio
async def test_a_model_that_keeps_no_schema_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.writer.info = replace(house.writer.info, unsupported=("response_format",))
    with pytest.raises(UnsuitableModelError, match=r"cannot keep an answer to the schema"):
        await enrich(house, "summary@2")
    assert statuses(await house.enrich(["abc"])) == ["ok"]


@pytest.mark.anyio
async def test_text_and_label_travel_apart(tmp_path: Path) -> None:
    fields = {
        "labels": ["Theory", "Case_Based"],
        "explanation": "Theory. The label is Theory. It proves bounds on the sample size.",
    }
    house = House(tmp_path, ScriptedEngine(lambda prompt: json.dumps(fields)))
    row = (await enrich(house, "explain@1", classes=CLASSES)).rows[0]
    assert (row.text, row.label, row.fields) == (
        "It proves bounds on the sample size.",
        "Theory",
        fields,
    )
    (prompt,) = house.writer.prompts
    assert "Neural_Networks\nTheory\nCase_Based" in prompt
    encoded = "".join(map(chr, house.encoder.embedded[0]))
    assert "Theory" not in encoded
    schema = json.loads(house.writer.requests[0].constraint.text)  # type: ignore[union-attr]
    assert schema["properties"]["labels"]["items"] == {"enum": list(CLASSES)}


@pytest.mark.anyio
async def test_a_label_alone_leaves_the_raw_feature(tmp_path: Path) -> None:
    answer = json.dumps({"label": "Theory", "confidence": 0.7})
    house = House(tmp_path, ScriptedEngine(lambda prompt: answer))
    row = (await enrich(house, "pseudo_label@1", classes=CLASSES)).rows[0]
    assert (row.status, row.text, row.label) == ("ok", None, "Theory")
    assert row.embedding_source == "raw"
    assert house.encoder.embedded == [(1, *map(ord, "abc"), 2)]


@pytest.mark.anyio
async def test_what_is_read_is_in_the_key(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def status(prompt: str, **options: Any) -> str:
        return (await enrich(house, prompt, **options)).rows[0].status

    house.writer._answer = lambda prompt: json.dumps({"text": "t"})
    assert await status("rewrite@1", variables={"digest": "a"}) == "ok"
    assert await status("rewrite@1", variables={"digest": "a"}) == "cached"
    assert await status("rewrite@1", variables={"digest": "b"}) == "ok"
    own = EnrichNode(id="n", text="abc", variables={"digest": "b"})
    assert await status("rewrite@1", nodes=[own], variables={"digest": "a"}) == "cached"
    house.writer._answer = lambda prompt: json.dumps({"label": "Theory", "confidence": 1.0})
    assert await status("pseudo_label@1", classes=("Theory", "Other")) == "ok"
    assert await status("pseudo_label@1", classes=("Theory", "Other")) == "cached"
    assert await status("pseudo_label@1", classes=("Other", "Theory")) == "ok"
    house.writer._answer = lambda prompt: json.dumps({"digest": "d"})
    for labels, expected in [(("x",), "ok"), ((None,), "ok"), (("x",), "cached")]:
        node = EnrichNode(id="n", text="abc", neighbors=("near",), neighbor_labels=labels)
        assert await status("labelled_digest@1", nodes=[node]) == expected
    assert await status("digest@2", nodes=[node]) == "ok"
    node = replace(node, neighbor_labels=("y",))
    assert await status("digest@2", nodes=[node]) == "cached"  # it reads none


@pytest.mark.anyio
async def test_neighbours_that_do_not_fit_are_left_out_from_the_end(tmp_path: Path) -> None:
    node = EnrichNode(id="n", text="abc", neighbors=tuple(f"<{i}>" + "x" * 90 for i in range(5)))
    prompt = default_catalog().get("digest@2")
    base = sum(len(f"[{m['role']}]{m['content']}") for m in prompt.fill("abc"))
    house = House(
        tmp_path,
        ScriptedEngine(
            lambda prompt: json.dumps({"digest": "d"}),
            max_model_len=base + prompt.max_tokens + 2 * 97 + 40,
        ),
    )
    row = (await enrich(house, "digest@2", [node])).rows[0]
    assert (row.status, row.neighbors_used, row.truncated_tokens) == ("ok", 2, 0)
    assert [f"<{i}>" in house.writer.prompts[0] for i in range(5)] == [True, True, False, False, False]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("explain@1", {}, "chooses among classes"),
        ("summary@2", {"classes": ("a",)}, "reads no classes"),
        ("explain@1", {"classes": ("a", "a")}, "named twice"),
        ("rewrite@1", {}, "needs the variable 'digest'"),
        ("rewrite@1", {"variables": {"digest": "d", "more": ""}}, "no variable 'more'"),
        ("summary@2", {"variables": {"text": ""}}, "no variable 'text'"),
    ],
)
def test_inputs_are_neither_missing_nor_in_vain(
    prompt: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptInputError, match=message):
        EnrichRequest(
            nodes=(EnrichNode(id="n", text="abc"),),
            prompt=default_catalog().get(prompt),
            model="writer",
            embedding_model="encoder",
            outputs=frozenset({"text"}),
            **options,
        )


@pytest.mark.parametrize(
    ("shared", "own", "place"),
    [
        ({}, [{}, {}], None),
        ({"more": ""}, [{"digest": "d"}], None),
        ({"digest": "d"}, [{}, {"more": ""}], 1),
        ({}, [{"digest": "d"}, {}], 1),
    ],
)
def test_the_node_whose_variables_are_at_fault_is_told(
    shared: dict[str, str], own: list[dict[str, str]], place: int | None
) -> None:
    with pytest.raises(PromptInputError) as caught:
        check_inputs(default_catalog().get("rewrite@1"), (), shared, own)
    assert (caught.value.param, caught.value.node) == ("variables", place)


def test_terms_are_lines_each_once() -> None:
    prompt = default_catalog().get("terms@2")
    term, other = {"term": "CSR", "meaning": "a format"}, {"term": "b", "meaning": "c"}
    terms = [term, term, other]
    answer = parse_answer(prompt, json.dumps({"terms": terms}), ())
    assert answer.text == "CSR: a format\nb: c"
    assert answer.fields == {"terms": terms}
    with pytest.raises(InvalidAnswerError, match="not complete JSON"):
        parse_answer(prompt, "{", ())


def test_text_prompts_have_no_constraint() -> None:
    assert constraint_of(default_catalog().get("summary@1"), ()) is None
    assert isinstance(constraint_of(default_catalog().get("summary@2"), ()), Constraint)


def test_text_answers_are_stripped_where_classes_are_known() -> None:
    explain = default_catalog().get("explain@1")
    plain = replace(explain, output={"type": "text"})
    assert parse_answer(plain, "It is Theory. It has proofs.", CLASSES).text == "It has proofs."
    digest = json.dumps(
        {"digest": "Label: Theory. The category of both is Theory. Bounds are proved."}
    )
    labelled = default_catalog().get("labelled_digest@1")
    assert parse_answer(labelled, digest, (), shown_labels=["Theory"]).text == "Bounds are proved."
    free = default_catalog().get("summary@1")
    assert parse_answer(free, "It is Theory. It has proofs.", ()).text.startswith("It is Theory")


# Label statements


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Answer: Neural_Networks. The paper trains a perceptron.", "The paper trains a perceptron."),
        ("The category is theory.\nBounds are proved.", "Bounds are proved."),
        ("Most likely category: unclear. It is short.", "It is short."),
        ("This paper belongs to Neural Networks. It is long.", "It is long."),
        ("I would classify it as case based! It retrieves cases.", "It retrieves cases."),
        ("Neural networks, Theory.", ""),
        ("It is Theory.", ""),
        ("Theory; most likely.  A sentence.", "most likely. A sentence."),
        ("Neural networks predict prices of theory books.", "Neural networks predict prices of theory books."),
        ("In theory each fits.", ""),  # rather one too many
        ("It trains neural networks on images.", "It trains neural networks on images."),
        ("A classification algorithm is proposed.", "A classification algorithm is proposed."),
        ("NEURAL-NETWORKS is the predicted class.", ""),
        ("Labels are scarce. The classes overlap.", "The classes overlap."),
        ("Theory is the right choice. It is long.", "It is long."),
        ("Theory (0.9), Neural Networks (0.1). Because bounds are proved.", "Because bounds are proved."),
        ("Theory 0.9", ""),
        ("**Theory** - it proves bounds", ""),
        ("## Theory\nIt proves bounds.", "It proves bounds."),
        ("1. Theory: it proves bounds", ""),
        ("1. Theory (60%)\n2. It is short.\n3) Neural Networks, for its layers.", "2. It is short."),
        ("1. Answer: unknown. 2. It is short.", "2. It is short."),
        ("1. It is Theory. 2. It is short.", "2. It is short."),
        ("Theory—it proves bounds", ""),
        ("Theory and Neural Networks: both are named.", ""),
        ("Theory was chosen, as it proves bounds.", ""),
        ("Theory because bounds are proved.", ""),
        ("Most likely Theory, since bounds are proved.", ""),
        ("Probably neural networks given its layers.", ""),
        ("I would choose Theory because it proves bounds.", ""),
        ("I'd pick the theory. It is long.", "It is long."),
        ("It should go under Neural Networks.", ""),
        ("One may assign the paper to theory.", ""),
        ("Neural networks (NNs): layers are trained.", ""),
        ("Neural networks (NNs) are trained on images.", "Neural networks (NNs) are trained on images."),
        ("Neural networks are trained on images of cats.", "Neural networks are trained on images of cats."),
        ("Theory of mind is studied in monkeys.", "Theory of mind is studied in monkeys."),
        ("Theory-based methods, e.g. theory, age.", "Theory-based methods, e.g. theory, age."),
        ("Neural networks choose actions. 1. It is short.", "Neural networks choose actions. 1. It is short."),
        ("", ""),
    ],
)  # fmt: skip
def test_label_statements_are_stripped(text: str, kept: str) -> None:
    assert strip_label_statements(text, CLASSES) == kept


@pytest.mark.anyio
@pytest.mark.parametrize("first", ["{", '{"digest": "Theory: bounds are proved. It is long."}'])
async def test_shown_labels_are_stripped_of_both_calls(first: str) -> None:
    answers = [first, '{"digest": "Theory: bounds are proved. It is long."}']

    async def ask(messages: Sequence[Message], constraint: Constraint | None) -> Written:
        return Written(text=answers.pop(0), tokens_in=1, tokens_out=1, finish_reason="stop")

    prompt = default_catalog().get("labelled_digest@1")
    answered = await answer_prompt(
        prompt, prompt.fill("abc"), (), 160, ask, shown_labels=["Theory"]
    )
    assert answered.answer is not None
    assert answered.answer.text == "It is long."


# What a graph lends to a prompt

NUM_NODES = 12


def secret(index: int) -> str:
    return f"SECRET{index:03}"


def split_of(index: int) -> str | None:
    return ("train", "val", "test", None)[index % 4]


def graph_of(folder: Path, ids: Sequence[Any], edges: Any, **parts: Any) -> Graph:
    store = GraphStore(folder)
    return store.get(create(store, columns(ids, edges, **parts)).id, OWNER)


@pytest.fixture
def labelled(tmp_path: Path) -> Any:
    """A complete graph in which every node's label is its own secret."""
    ids = [f"n{i}" for i in range(NUM_NODES)]
    edges = [(a, b) for a in ids for b in ids if a < b]
    return graph_of(
        tmp_path / "graphs",
        ids,
        edges,
        texts=[f"own words {chr(97 + i)}" for i in range(NUM_NODES)],
        labels=[secret(i) for i in range(NUM_NODES)],
        splits=[split_of(i) for i in range(NUM_NODES)],
    )


def valid_answer(prompt: Prompt) -> Callable[[str], str]:
    def answer(_: str) -> str:
        fields: dict[str, Any] = {
            "summary": "s", "digest": "d", "text": "t", "relation": "r", "strength": 1, "explanation": "e",
            "labels": [secret(0)], "label": secret(0), "confidence": 0.5, "terms": [{"term": "a", "meaning": "b"}],
        }  # fmt: skip
        if prompt.output["type"] == "text":
            return "answer"
        return json.dumps({name: fields[name] for name in prompt.output["schema"]["properties"]})

    return answer


@pytest.mark.anyio
@pytest.mark.parametrize("prompt", all_prompts(), ids=lambda prompt: prompt.ref)
async def test_no_label_of_a_held_out_node_enters_a_prompt(
    tmp_path: Path, labelled: Any, prompt: Prompt
) -> None:
    """Every node with all the others as neighbours; validation, test and unassigned labels appear nowhere."""
    house = House(tmp_path, ScriptedEngine(valid_answer(prompt)))
    nodes = nodes_of_graph(labelled, range(NUM_NODES), prompt)
    classes = classes_of_graph(labelled, prompt)
    result = await enrich(
        house,
        prompt.ref,
        nodes,
        classes=classes,
        variables={name: "value" for name in prompt.variables},
    )
    assert statuses(result) == ["ok"] * NUM_NODES
    held_out = [secret(i) for i in range(NUM_NODES) if split_of(i) != "train"]
    sent = [
        "".join(map(chr, request.token_ids)) + (request.constraint or Constraint(kind="regex")).text
        for request in house.writer.requests
    ]
    assert len(sent) >= NUM_NODES
    assert not [label for label in held_out for text in sent if label in text]
    trained = [secret(i) for i in range(NUM_NODES) if split_of(i) == "train"]
    reads_labels = {"classes", "neighbor_labels"} & set(prompt.inputs)
    for index in range(NUM_NODES):
        (own,) = [text for text in sent if f"<text>\nown words {chr(97 + index)}\n" in text]
        seen = [label for label in trained if label in own]
        if not reads_labels:
            assert seen == []
        elif "neighbor_labels" in prompt.inputs:
            assert secret(index) not in own  # its own label is no neighbour's
            assert seen


def test_training_labels_and_classes(labelled: Any, tmp_path: Path) -> None:
    assert training_labels(labelled, range(5)) == (secret(0), None, None, None, secret(4))
    assert training_classes(labelled) == (secret(0), secret(4), secret(8))
    bare = graph_of(tmp_path / "bare", ["a", "b"], [("a", "b")], labels=["x", "y"])
    assert training_labels(bare, [0, 1]) == (None, None)  # no split, no training nodes
    assert training_classes(bare) == ()
    numbers = graph_of(tmp_path / "n", [1, 2], [(1, 2)], labels=[10, 9], splits=["train", "train"])
    assert training_classes(numbers) == ("9", "10")


def test_named_neighbours(labelled: Any) -> None:
    digest = default_catalog().get("labelled_digest@1")
    (node,) = nodes_of_graph(labelled, [1], digest, neighbors=[["n4", "n2"]])
    assert node.neighbors == ("own words e", "own words c")
    assert node.neighbor_labels == (secret(4), None)
    for neighbors, param in [
        ([["n4"], []], "neighbors"),
        ([["n4", "x"]], "neighbors[0][1]"),
        ([["n1"]], "neighbors[0][0]"),  # itself, whose label must not come in this way
        ([["n4", "n4"]], "neighbors[0][1]"),
    ]:
        with pytest.raises(NodeInputError) as caught:
            nodes_of_graph(labelled, [1], digest, neighbors=neighbors)
        assert caught.value.param == param
    with pytest.raises(NodeInputError, match="one item per node"):
        nodes_of_graph(labelled, [1], digest, variables=[])
