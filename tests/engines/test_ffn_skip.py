"""Skipping while decoding against one request at a time in transformers' modules, and what must not change it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.checkpoint import add_skip_profile
from compression.ffn_skip.profile import SkipPoint, SkipProfile, Substitute
from compression.ffn_skip.rule import NEVER
from compression.ffn_skip.substitute import Fitted
from compression.safetensors_header import CheckpointError
from engines.engine import NativeEngine
from engines.ffn_skip import row_taus
from engines.kernels.cpu_step import CpuStep
from engines.protocol import EngineError, SamplingParams, Skip, TokenOutput
from engines.requests import EngineLimits
from tests.compression.ffn_skip.models import skipping_llama
from tests.compression.models import save_and_import
from tests.engines.decoding import build_request, run, run_one, token_ids_of
from tests.reference.ffn_skip import Trace, generate

pytestmark = pytest.mark.usefixtures("single_thread")

NUM_LAYERS, HIDDEN, VOCAB = 7, 48, 97
BLOCK_BYTES = 2 * NUM_LAYERS * 2 * 12 * 16 * 4
POINTS = (
    SkipPoint(target_ratio=0.1, tau=0.98, skip_ratio=0.1),
    SkipPoint(target_ratio=0.2, tau=0.97, skip_ratio=0.2),
    SkipPoint(target_ratio=0.3, tau=0.96, skip_ratio=0.3),
)
LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
PROFILE = Skip(mode="profile")
Build = Callable[..., NativeEngine]


@dataclasses.dataclass(frozen=True)
class Skipping:
    model: Any
    source: Path
    folder: Path
    profile: SkipProfile
    substitutes: dict[int, Fitted]

    def oracle(self, prompt: list[int], tau: float, max_tokens: int = 40) -> Trace:
        profile = self.profile
        return generate(
            self.model,
            prompt,
            max_tokens,
            tau=tau,
            k=profile.k,
            warm_up=profile.warm_up,
            cold=(profile.cold_start, profile.cold_end),
            substitutes=self.substitutes,
        )


def profile_of(**changes: Any) -> SkipProfile:
    kinds = {2: Substitute(kind="mean"), 4: Substitute(kind="linear", rank=3)}
    values: dict[str, Any] = {
        "num_layers": NUM_LAYERS, "hidden_size": HIDDEN, "cold_start": 1, "cold_end": 1, "k": 2,
        "warm_up": 5, "points": POINTS, "dtype": "F32",
        "substitutes": tuple(kinds.get(n, Substitute()) for n in range(NUM_LAYERS)),
    }  # fmt: skip
    return SkipProfile(**values | changes)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Skipping:
    folder = tmp_path_factory.mktemp("skipping")
    model = skipping_llama(NUM_LAYERS, vocab_size=VOCAB, ties=False)
    source = save_and_import(model, folder / "hf", folder / "models")
    profile = profile_of()
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(info.shape, generator=generator) / 30
        for name, info in profile.tensors().items()
    }
    add_skip_profile(source, folder / "skip", profile, tensors)
    substitutes = {
        n: Fitted.from_tensors(kind, n, tensors)
        for n, kind in enumerate(profile.substitutes)
        if kind.kind != "none"
    }
    return Skipping(model, source, folder / "skip", profile, substitutes)


@pytest.fixture(scope="module")
def build(skipping: Skipping) -> Build:
    def build(folder: Path = skipping.folder, **limits: Any) -> NativeEngine:
        return NativeEngine.load(
            "skipping", folder, dtype=torch.float32, limits=EngineLimits(**limits)
        )

    return build


def prompt_of(index: int) -> list[int]:
    return [(7 * index + 3 * j) % 90 for j in range(3 + (11 * index) % 45)]


def counts(outputs: Sequence[TokenOutput]) -> tuple[int, int]:
    return outputs[-1].ffn_rows_skipped, outputs[-1].ffn_rows_total


def test_it_equals_one_request_at_a_time_however_it_comes_about(
    skipping: Skipping, build: Build
) -> None:
    """Alone, among 16 of other thresholds and of none, with prompts in pieces, after preemptions."""
    skips = [
        PROFILE,
        Skip(mode="target", target_ratio=0.2),
        Skip(),
        Skip(mode="target", target_ratio=0.1),
    ]
    taus = [0.96, 0.97, NEVER, 0.98]
    requests = [build_request(f"r{i}", prompt_of(i), LONG, skip=skips[i % 4]) for i in range(16)]
    traces = {f"r{i}": skipping.oracle(prompt_of(i), taus[i % 4]) for i in range(16)}
    expected = {
        key: (trace.token_ids, (len(trace.skipped), 39 * NUM_LAYERS if i % 4 != 2 else 0))
        for i, (key, trace) in enumerate(traces.items())
    }
    shares = [expected[f"r{i}"][1][0] / (39 * NUM_LAYERS) for i in range(4)]
    assert shares[0] > shares[1] > shares[3] > shares[2] == 0
    dense = [skipping.oracle(prompt_of(i), NEVER).token_ids for i in range(4)]
    assert any(dense[i] != traces[f"r{i}"].token_ids for i in range(4))

    def found(engine: NativeEngine) -> dict[str, Any]:
        outputs = run(engine, requests)
        return {key: (token_ids_of(part), counts(part)) for key, part in outputs.items()}

    engine = build()
    alone = run_one(engine, requests[0])
    assert (token_ids_of(alone), counts(alone)) == expected["r0"]
    assert found(engine) == expected
    stats = engine.stats()
    skipped = sum(part[1][0] for part in expected.values()) + counts(alone)[0]
    assert stats.ffn_rows_skipped_total == skipped
    assert stats.ffn_rows_total == 13 * 39 * NUM_LAYERS
    assert found(build(max_num_batched_tokens=16)) == expected
    tight = build(kv_cache_bytes=14 * BLOCK_BYTES)
    assert found(tight) == expected
    assert tight.stats().preemptions_total > 2


def test_above_one_it_is_the_dense_model(skipping: Skipping, build: Build, tmp_path: Path) -> None:
    point = SkipPoint(target_ratio=0.5, tau=1.01, skip_ratio=0.0)
    plain = (Substitute(),) * NUM_LAYERS
    profile = profile_of(points=(point,), substitutes=plain, warm_up=0)
    add_skip_profile(skipping.source, tmp_path / "never", profile, {})
    engine, dense = build(tmp_path / "never"), build(skipping.source)
    for index in range(4):
        request = build_request("r", prompt_of(index), LONG, skip=PROFILE)
        outputs = run_one(engine, request)
        off = run_one(dense, dataclasses.replace(request, skip=Skip()))
        assert token_ids_of(outputs) == token_ids_of(off)
        assert counts(outputs) == (0, 39 * NUM_LAYERS)
        assert counts(off) == (0, 0)


def test_the_warm_up_is_dense(skipping: Skipping, build: Build) -> None:
    """Five generated tokens run in full, so the sixth's step, which gives the seventh, is the first that skips."""
    outputs = run_one(build(), build_request("r", prompt_of(1), LONG, skip=PROFILE))
    first = next(i for i, output in enumerate(outputs) if output.ffn_rows_skipped)
    assert first >= 6
    dense = run_one(build(), build_request("r", prompt_of(1), LONG))
    assert token_ids_of(outputs)[:6] == token_ids_of(dense)[:6]
    assert [output.ffn_rows_total for output in outputs[:3]] == [0, NUM_LAYERS, 2 * NUM_LAYERS]


def test_blocks_of_skipped_tokens_are_found_by_nobody_else(
    skipping: Skipping, build: Build
) -> None:
    engine = build()
    prompt = prompt_of(3)[:20]
    answer = token_ids_of(run_one(engine, build_request("a", prompt, LONG, skip=PROFILE)))
    follow_up = [*prompt, *answer, 7]
    outputs = run_one(engine, build_request("b", follow_up, LONG))
    assert outputs[-1].num_cached_tokens == 16  # the block that holds nothing but prompt
    assert token_ids_of(outputs) == skipping.oracle(follow_up, NEVER).token_ids


def test_a_share_that_is_not_there_is_refused(skipping: Skipping, build: Build) -> None:
    engine = build()
    assert "skip" not in engine.info.unsupported
    far = build_request("r", [1, 2], LONG, skip=Skip(mode="target", target_ratio=0.5))
    with pytest.raises(EngineError, match=r"calibrated for 0\.1 to 0\.3") as caught:
        engine.submit(far)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "skip.target_ratio")
    without = build(skipping.source)
    for skip in (PROFILE, Skip(mode="target", target_ratio=0.2)):
        with pytest.raises(EngineError, match="no skip profile") as caught:
            without.submit(build_request("r", [1, 2], LONG, skip=skip))
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "skip")
    assert not engine.has_work()
    assert not without.has_work()


def test_it_wakes_up_with_its_profile(skipping: Skipping, build: Build) -> None:
    engine = build()
    request = build_request("r", prompt_of(2), LONG, skip=PROFILE)
    before = run_one(engine, request)
    engine.sleep()
    engine.wake()
    after = run_one(engine, request)
    assert token_ids_of(after) == token_ids_of(before)
    assert counts(after) == counts(before)
    assert counts(after)[0] > 0


def test_a_profile_of_another_model_is_refused(
    skipping: Skipping, build: Build, tmp_path: Path
) -> None:
    other = profile_of(num_layers=8, substitutes=(Substitute(),) * 8)
    add_skip_profile(skipping.source, tmp_path / "other", other, {})
    with pytest.raises(
        CheckpointError, match="of 8 layers and 48 channels, the model has 7 and 48"
    ):
        build(tmp_path / "other")


def test_taus_of_rows() -> None:
    assert row_taus(None, 0, 2, 0) == [NEVER, NEVER]
    assert row_taus(0.9, 3, 4, 5) == [NEVER, NEVER, 0.9, 0.9]
    assert row_taus(0.9, 7, 1, 5) == [0.9]
    assert row_taus(0.9, 0, 2, 9) == [NEVER, NEVER]


def test_the_native_call_and_plain_ops_decide_alike(skipping: Skipping, build: Build) -> None:
    requests = [build_request(f"r{i}", prompt_of(i), LONG, skip=PROFILE) for i in range(4)]
    engine, plain = build(), build()
    if not isinstance(engine._cpu_step, CpuStep):
        pytest.skip(f"no native library: {engine._cpu_step}")
    plain._cpu_step = "left out by this test"
    ours, theirs = run(engine, requests), run(plain, requests)
    for key in ours:
        assert token_ids_of(ours[key]) == token_ids_of(theirs[key])
        assert counts(ours[key]) == counts(theirs[key])
        assert counts(ours[key])[0] > 30
