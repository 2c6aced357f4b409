"""Whole runs of every method on tiny models of every kind: what changes, what does not, and what it costs."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.checkpoint import open_checkpoint, verify_checkpoint
from compression.hf import load_model
from compression.pruning import two_four
from compression.safetensors_header import CheckpointError
from training.batches import collate, total_loss
from training.data import DataError, Encoded, read_examples
from training.ledger import MemoryLedger
from training.spec import SettingsError, parse_settings
from training.trainer import (
    FinetuneError,
    FinetuneReport,
    FinetuneStopped,
    Hooks,
    StepMetrics,
    build_encoder,
    finetune,
    learning_rate_at,
)

ROOT = Path(__file__).parents[2]
SMALL = {"rank": 8, "refresh_interval": 4}
METHODS: dict[str, Any] = {
    "full": "full",
    "galore": {"galore": SMALL},
    "qgalore": {"qgalore": SMALL},
    "lora": {"lora": {"rank": 4}},
    "qlora": {"qlora": {"rank": 4}},
    "qlora8": {"qlora": {"rank": 4, "bits": 8}},
    "lrc_only": "lrc_only",
    "lrc_only_qgalore": {"lrc_only_qgalore": SMALL},
}
BASE = {
    "epochs": 2, "batch_size": 4, "max_length": 32, "learning_rate": 5e-3, "dtype": "float32",
    "evaluation_share": 0.1,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, examples: Path) -> Callable[..., FinetuneReport]:
    def finetune_into(source: Path, **changes: Any) -> FinetuneReport:
        hooks = changes.pop("hooks", Hooks())
        name = changes.pop("name", "output")
        train = changes.pop("train", examples)
        return finetune(
            source,
            tmp_path / name,
            tmp_path / f"work-{name}",
            settings=parse_settings({**BASE, **changes}),
            train=train,
            source_id="tiny",
            hooks=hooks,
        )

    return finetune_into


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(folder).tensors())


PAIRS = [
    ("dense", "full"), ("dense", "galore"), ("dense", "qgalore"), ("dense", "lora"), ("dense", "qlora"),
    ("dense", "qlora8"), ("pruned", "full"), ("pruned", "galore"), ("pruned", "qgalore"),
    ("low_rank", "full"), ("low_rank", "qgalore"), ("low_rank", "lora"), ("low_rank", "qlora"),
    ("low_rank", "lrc_only"), ("low_rank", "lrc_only_qgalore"), ("int4", "full"), ("int4", "qgalore"),
    ("int4", "lora"), ("low_rank_int4", "lrc_only"), ("low_rank_int4", "galore"),
    ("int8", "full"), ("int8", "lora"), ("two_four", "full"), ("two_four", "qgalore"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_every_method_learns_on_every_kind(
    sources: dict[str, Path],
    run: Callable[..., FinetuneReport],
    tmp_path: Path,
    kind: str,
    method: str,
) -> None:
    if method in ("lora", "qlora", "qlora8"):
        pytest.importorskip("peft")
    if method.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    seen: list[StepMetrics] = []
    source = sources[kind]
    before = tensors(source)
    report = run(source, method=METHODS[method], hooks=Hooks(on_metrics=seen.append))
    output = tmp_path / "output"
    assert verify_checkpoint(output).ok
    assert tensors(source).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(source).items())
    assert [metrics.step for metrics in seen] == list(range(1, report.steps + 1))
    assert report.evaluations[-1][1] < report.evaluations[0][1] * 0.95
    assert report.skipped_updates == 0
    # The result, loaded as anybody would, has the loss that the run ended with.
    settings = parse_settings({**BASE, "method": METHODS[method]})
    model = load_model(output, dtype=torch.float32)
    # bitsandbytes evaluates an 8-bit base with activations of 8 bits, too
    tolerance = 5e-3 if method == "qlora8" else 2e-4
    assert served_loss(model, output, settings, report) == pytest.approx(
        report.evaluations[-1][1], rel=tolerance
    )
    assert_only_declared_changes(kind, method, before, tensors(output))
    manifest = open_checkpoint(output).manifest
    assert manifest.stage_results[-1]["finetune"]["steps"] == report.steps
    assert manifest.source["model"] == "tiny"
    assert_near(report.predicted, report.measured)


def served_loss(model: Any, folder: Path, settings: Any, report: FinetuneReport) -> float:
    """Mean loss over the examples that were kept back, one by one and without packing."""
    from training.data import split_evaluation

    encoder = build_encoder(folder, settings.max_length)
    path = Path(EXAMPLES[0])
    pieces = [piece for example in read_examples(path) for piece in encoder(example)]
    _, kept_back = split_evaluation(pieces, settings.evaluation_share, settings.seed)
    assert len(kept_back) == report.num_evaluation_examples
    nll, count = 0.0, 0
    for piece in kept_back:
        ids = torch.tensor(piece.ids)
        logs = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
        learnt = torch.tensor(piece.learnt[1:])
        nll -= float(logs.gather(1, ids[1:, None])[:, 0][learnt].sum())
        count += int(learnt.sum())
    return nll / count


EXAMPLES: list[Path] = []


@pytest.fixture(autouse=True)
def remember_examples(examples: Path) -> None:
    EXAMPLES[:] = [examples]


def assert_only_declared_changes(
    kind: str, method: str, before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    for name, tensor in after.items():
        if name not in before:  # codes became a weight
            assert kind in ("int4", "int8", "low_rank_int4"), name
            continue
        if name.endswith((".bitmask", ".shape")):
            continue
        changed = not torch.equal(tensor, before[name])
        factor = name.endswith(("weight_u", "weight_v"))
        matrix = name.endswith("weight") and "_proj" in name
        if method.startswith("lrc_only"):
            assert changed == (factor or "norm" in name), name
        elif "lora" in method:
            assert changed == (factor or matrix), name
        elif changed is False:
            # a key's bias shifts all scores of a query alike, so that it has no gradient to speak of
            assert name.endswith("k_proj.bias"), name
    if kind == "two_four":
        for name in (name for name in before if name.endswith(".compressed")):
            old, new = _decoded(before, name), _decoded(after, name)
            assert not torch.equal(old, new), name
            assert ((new == 0) | (old != 0)).all(), name  # zeros stay, and rounding may make more
    if kind == "pruned":
        for name, tensor in before.items():
            if "_proj.weight" in name:
                assert ((after[name] == 0) | (tensor != 0)).all(), name
                assert float((after[name] != 0).float().mean()) > 0.45


def _decoded(stored: dict[str, Tensor], name: str) -> Tensor:
    path = name.removesuffix("compressed")
    return two_four.from_tensors(
        {suffix: stored[path + suffix] for suffix in ("compressed", "bitmask", "shape")}
    )


def assert_near(predicted: MemoryLedger, measured: MemoryLedger) -> None:
    """Rows are not all full here, so what grows with tokens is an upper bound."""
    for part in ("weights", "optimizer", "projections", "gradients"):
        expected, found = getattr(predicted, part), getattr(measured, part)
        assert found == pytest.approx(expected, rel=0.05), part
    assert 0.5 * predicted.activations < measured.activations <= predicted.activations * 1.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("dense", "full"), ("dense", "qgalore"), ("dense", "lora"), ("low_rank", "lrc_only"),
        ("low_rank", "lrc_only_qgalore"), ("low_rank", "full"),
    ],
)  # fmt: skip
def test_the_ledger_is_within_five_percent_of_what_full_rows_take(
    sources: dict[str, Path],
    run: Callable[..., FinetuneReport],
    tmp_path: Path,
    dtype: str,
    kind: str,
    method: str,
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "abcdefgh" * 32}))
    evaluation = {"evaluation_share": 0.0, "max_steps": 1, "dtype": dtype, "batch_size": 8}
    report = run(sources[kind], method=METHODS[method], train=path, **evaluation)
    assert report.steps == 1
    for part in ("weights", "optimizer", "projections", "gradients", "activations"):
        expected, found = getattr(report.predicted, part), getattr(report.measured, part)
        assert found == pytest.approx(expected, rel=0.05), part
    assert report.measured.peak + report.predicted.temporary == pytest.approx(
        report.predicted.peak, rel=0.05
    )


def test_rows_of_several_examples_are_what_each_is_alone(sources: dict[str, Path]) -> None:
    model = load_model(sources["dense"], dtype=torch.float32)
    lengths, device = [5, 3, 7, 1, 9], torch.device("cpu")
    pieces = [
        Encoded(1, [(7 * i + j) % 32 for j in range(n)], [j % 3 != 1 for j in range(n)])
        for i, n in enumerate(lengths)
    ]
    together = collate([pieces[:3], pieces[3:]], device)
    assert together.num_tokens == sum(lengths)
    alone = [collate([[piece]], device) for piece in pieces]
    assert together.num_learnt == sum(batch.num_learnt for batch in alone)
    assert together.num_learnt == sum(sum(piece.learnt[1:]) for piece in pieces)
    with torch.no_grad():
        expected = sum(float(total_loss(model, b)) for b in alone if b.num_learnt)
        assert float(total_loss(model, together)) == pytest.approx(expected, rel=1e-5)


def test_the_schedule_warms_up_and_falls_to_a_tenth() -> None:
    settings = parse_settings({"method": "full", "learning_rate": 1.0, "warmup_ratio": 0.2})
    rates = [learning_rate_at(step, 10, settings) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.55)  # halfway along the cosine
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert learning_rate_at(10, 10, settings) == pytest.approx(0.1)


def test_one_tick_per_optimizer_step_however_it_is_accumulated(
    sources: dict[str, Path], run: Callable[..., FinetuneReport]
) -> None:
    """Four passes of one row are a pass of four, but for the order of sums: the same steps, losses and rates."""
    found = []
    for size, passes in ((4, 1), (1, 4)):
        seen: list[StepMetrics] = []
        run(
            sources["dense"],
            method={"full": {}},
            batch_size=size,
            gradient_accumulation=passes,
            name=f"by-{size}",
            hooks=Hooks(on_metrics=seen.append),
        )
        found.append(seen)
    assert [m.learning_rate for m in found[0]] == [m.learning_rate for m in found[1]]
    losses = [[m.loss for m in seen] for seen in found]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_gradient_checkpointing_changes_nothing_but_memory(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path
) -> None:
    reports = [
        run(
            sources["dense"],
            method=METHODS["qgalore"],
            gradient_checkpointing=on,
            name=f"checkpointing-{on}",
        )
        for on in (False, True)
    ]
    off, on = (tensors(tmp_path / f"checkpointing-{on}") for on in (False, True))
    assert all(torch.equal(tensor, on[name]) for name, tensor in off.items())
    assert reports[1].measured.activations < reports[0].measured.activations / 2


@pytest.mark.parametrize("method", ["full", "qgalore"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_per_layer_updates_give_the_same_model(
    sources: dict[str, Path],
    run: Callable[..., FinetuneReport],
    tmp_path: Path,
    method: str,
    accumulation: int,
) -> None:
    """Tied embeddings, which two places of the model use, included."""
    for per_layer in (False, True):
        options = {**(SMALL if method == "qgalore" else {}), "per_layer": per_layer}
        run(
            sources["dense"],
            method={method: options},
            max_gradient_norm=None,
            gradient_accumulation=accumulation,
            name=f"per-layer-{per_layer}",
        )
    off, on = (tensors(tmp_path / f"per-layer-{on}") for on in (False, True))
    assert all(torch.equal(tensor, on[name]) for name, tensor in off.items())


def stop_after(step: int, reason: Any) -> Hooks:
    seen: list[int] = []
    return Hooks(
        on_metrics=lambda metrics: seen.append(metrics.step),
        stop_requested=lambda: reason if seen and seen[-1] >= step else None,
    )


@pytest.mark.parametrize("method", ["full", "qgalore", "lora"])
def test_pausing_changes_nothing(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path, method: str
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    whole = run(sources["dense"], method=METHODS[method], dtype="bfloat16", name="whole")
    settings = {"method": METHODS[method], "dtype": "bfloat16", "name": "paused"}
    for step in (1, 4):
        with pytest.raises(FinetuneStopped) as caught:
            run(sources["dense"], **settings, hooks=stop_after(step, "pause"))
        assert (caught.value.reason, caught.value.step) == ("pause", step)
    events: list[str] = []
    resumed = run(sources["dense"], **settings, hooks=Hooks(on_event=events.append))
    assert "resumed after step 4" in events
    paused = tensors(tmp_path / "paused")
    assert all(torch.equal(t, paused[name]) for name, t in tensors(tmp_path / "whole").items())
    assert resumed.losses == whole.losses
    assert resumed.evaluations == whole.evaluations
    assert (resumed.refreshes, resumed.num_tokens) == (whole.refreshes, whole.num_tokens)


def test_cancelling_keeps_a_checkpoint_and_writes_no_model(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path
) -> None:
    with pytest.raises(FinetuneStopped):
        run(sources["dense"], method="full", hooks=stop_after(2, "cancel"))
    assert not (tmp_path / "output").exists()
    assert [path.name for path in (tmp_path / "work-output").glob("step-*")] == ["step-00000002"]


def test_the_newest_and_the_best_checkpoints_are_kept(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path
) -> None:
    saved: list[int] = []
    report = run(
        sources["dense"],
        method="full",
        learning_rate=0.05,  # too much: the best is not the last
        checkpoint_every=2,
        evaluate_every=1,
        keep_last=2,
        hooks=Hooks(on_checkpoint=saved.append),
    )
    best = min(report.evaluations, key=lambda pair: pair[1])[0]
    assert report.best_step == best
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "work-output").glob("step-*"))
    assert set(kept) == ({*saved[-2:], best} if best else set(saved[-2:]))
    assert saved[-1] == report.steps


@pytest.mark.parametrize("damage", ["flip", "truncate", "no-state", "bad-json"])
def test_an_unsound_checkpoint_is_passed_over(
    sources: dict[str, Path],
    run: Callable[..., FinetuneReport],
    tmp_path: Path,
    damage: str,
) -> None:
    run(sources["dense"], method="full", name="whole")
    settings = {"method": "full", "checkpoint_every": 2}
    with pytest.raises(FinetuneStopped):
        run(sources["dense"], **settings, hooks=stop_after(5, "pause"))
    newest = tmp_path / "work-output" / "step-00000005"
    weights, state = newest / "weights.safetensors", newest / "state.json"
    if damage == "flip":
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "no-state":
        state.unlink()
    else:
        state.write_text("{")
    events: list[str] = []
    run(sources["dense"], **settings, hooks=Hooks(on_event=events.append))
    assert "resumed after step 4" in events
    whole = tensors(tmp_path / "whole")
    assert all(torch.equal(t, whole[name]) for name, t in tensors(tmp_path / "output").items())


def test_work_of_other_settings_is_not_taken_for_ours(
    sources: dict[str, Path], run: Callable[..., FinetuneReport]
) -> None:
    with pytest.raises(FinetuneStopped):
        run(sources["dense"], method="full", hooks=stop_after(2, "pause"))
    events: list[str] = []
    run(sources["dense"], method="full", seed=1, hooks=Hooks(on_event=events.append))
    assert not any("resumed" in event for event in events)


KILLED = """
import os, signal, sys
from pathlib import Path
from training.spec import parse_settings
from training.trainer import Hooks, finetune
import json
source, output, work, train, settings, step = sys.argv[1:]
def on_metrics(metrics):
    if metrics.step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
finetune(Path(source), Path(output), Path(work), settings=parse_settings(json.loads(settings)), train=Path(train),
         source_id="tiny", hooks=Hooks(on_metrics=on_metrics))
"""


@pytest.mark.processes
def test_a_killed_process_resumes_to_the_same_bits(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path, examples: Path
) -> None:
    """kill -9 at a step nobody chose, with checkpoints every two steps; the next process goes on."""
    settings = {**BASE, "method": METHODS["qgalore"], "dtype": "bfloat16", "checkpoint_every": 2}
    whole = run(sources["dense"], **{**settings, "name": "whole"})
    step = int.from_bytes(examples.read_bytes()[:2]) % (whole.steps - 2) + 2
    output, work = tmp_path / "killed", tmp_path / "work-killed"
    arguments = [sources["dense"], output, work, examples, json.dumps(settings)]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    first = subprocess.run([*command, str(step)], cwd=ROOT, timeout=120, check=False)
    assert first.returncode == -9
    assert not output.exists()
    assert list(work.glob("step-*"))
    subprocess.run([*command, "-1"], cwd=ROOT, timeout=120, check=True)
    killed = tensors(output)
    assert all(torch.equal(t, killed[name]) for name, t in tensors(tmp_path / "whole").items())


def test_a_run_that_diverges_ends_by_name(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path
) -> None:
    with pytest.raises(FinetuneError, match="lower learning rate") as caught:
        run(
            sources["dense"],
            method="full",
            learning_rate=9.9,
            max_gradient_norm=None,
            weight_decay=0.9,
            epochs=30,
        )
    assert caught.value.code == "diverged"
    assert not (tmp_path / "output").exists()


def test_bad_data_and_misfits_are_refused_before_any_training(
    sources: dict[str, Path], run: Callable[..., FinetuneReport], tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "' + "b" * 99 + '"}'
    )
    with pytest.raises(DataError, match="max_length is 32") as caught:
        run(sources["dense"], method="full", train=path)
    assert (caught.value.line, caught.value.code) == (2, "too_long")
    path.write_text('{"prompt": "<|im_end|>", "completion": "b"}')
    with pytest.raises(DataError, match="control token"):
        run(sources["dense"], method="full", train=path)
    with pytest.raises(SettingsError, match="compress it with welore"):
        run(sources["dense"], method="lrc_only")
    with pytest.raises(SettingsError, match="max_position_embeddings"):
        run(sources["dense"], method="full", max_length=65)
    with pytest.raises(CheckpointError):
        run(tmp_path, method="full")
    assert not (tmp_path / "work-output").exists()


def test_chat_is_rendered_by_the_models_own_template(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    path.write_text(json.dumps({"messages": messages}))
    encoder = build_encoder(sources["dense"], 64)
    (example,) = read_examples(path)
    # The fixture's template has no generation prompt: all of the assistant's turn is learnt.
    (encoded,) = encoder(example)
    words = dict(
        enumerate(
            ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz "]
        )
    )
    spelt = "".join(words[i] for i in encoded.ids)
    assert spelt == "<|im_start|>user ab<|im_end|><|im_start|>assistant cd<|im_end|>"
    learnt = "".join(words[i] for i, yes in zip(encoded.ids, encoded.learnt, strict=True) if yes)
    assert learnt == "<|im_start|>assistant cd<|im_end|>"


def test_a_report_is_json(sources: dict[str, Path], run: Callable[..., FinetuneReport]) -> None:
    report = run(sources["dense"], method="full", max_steps=2)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["steps"] == 2
    assert data["measured"]["peak"] == report.measured.peak
    assert math.isfinite(data["tokens_per_second"])
    assert dataclasses.replace(report, seconds=0.0).seconds == 0
