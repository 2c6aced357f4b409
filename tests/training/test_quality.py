"""What the methods are for, on a small scale: nearly AdamW's loss with a fraction of its memory, and recovery after
WeLore."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression.pipeline import compress
from compression.recipe import parse_recipe
from training.ledger import MemoryLedger
from training.spec import parse_settings
from training.trainer import FinetuneReport, finetune

STEPS = 96
Run = Callable[..., FinetuneReport]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Synthetic text: thirty words of up to five letters in random order."""
    chooser = random.Random(0)
    words = [
        "".join(chooser.choice("abcdefghijklmnop") for _ in range(chooser.randint(2, 5)))
        for _ in range(30)
    ]
    texts = [" ".join(chooser.choice(words) for _ in range(12)) for _ in range(300)]
    train = folder / "train.jsonl"
    train.write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def train_into(name: str, source: Path, method: Any, **changes: Any) -> FinetuneReport:
        shared = {
            "max_steps": STEPS, "batch_size": 8, "max_length": 64, "dtype": "float32",
            "checkpoint_every": 10_000, "method": method,
        }  # fmt: skip
        return finetune(
            source,
            folder / name,
            folder / f"work-{name}",
            settings=parse_settings({**shared, **changes}),
            train=train,
            source_id="tiny",
        )

    return train_into


@pytest.fixture(scope="module")
def adamw(
    run: Run, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> FinetuneReport:
    return run("adamw", sources["dense"], "full", learning_rate=1e-2)


def held(ledger: MemoryLedger) -> int:
    return ledger.weights + ledger.optimizer + ledger.projections


def test_q_galore_is_near_adamw_with_few_bases(
    run: Run, sources: dict[str, Path], adamw: FinetuneReport
) -> None:
    """Within 5 % of AdamW's loss, at least 60 % of the refreshes saved, and none of the quality for it."""
    options = {"rank": 32, "scale": 1.0, "refresh_interval": 3}
    lazy = run("lazy", sources["dense"], {"qgalore": options}, learning_rate=1e-2)
    fixed = run(
        "fixed", sources["dense"], {"qgalore": {**options, "lazy": False}}, learning_rate=1e-2
    )
    assert adamw.evaluations[-1][1] < 0.25 * adamw.evaluations[0][1]
    assert lazy.evaluations[-1][1] < 1.05 * adamw.evaluations[-1][1]
    assert lazy.evaluations[-1][1] < 1.02 * fixed.evaluations[-1][1]
    assert fixed.refreshes == fixed.refreshes_fixed == lazy.refreshes_fixed
    assert lazy.refreshes <= 0.4 * lazy.refreshes_fixed
    assert held(lazy.measured) < 0.35 * held(adamw.measured)


def test_lrc_only_recovers_what_lora_does_with_less_memory(
    run: Run, adamw: FinetuneReport, folder: Path
) -> None:
    """At equal tokens, after WeLore at an effective rank reduction of three quarters; LoRA on the same factors."""
    pytest.importorskip("peft")
    small = folder / "small"
    small.mkdir()
    stage = {"welore": {"err": 0.75, "count": "all", "rank_multiple": 8}}
    compress(folder / "adamw", small, parse_recipe([stage]), source_id="tiny")
    lrc = run("lrc", small, "lrc_only", learning_rate=3e-3, max_steps=30)
    lora = run("lora", small, {"lora": {"rank": 4}}, learning_rate=3e-3, max_steps=30)
    lost = lora.evaluations[0][1]
    assert lrc.evaluations[0][1] == pytest.approx(lost)
    assert lost > 1.2 * adamw.evaluations[-1][1]
    assert lrc.evaluations[-1][1] < 1.05 * adamw.evaluations[-1][1]
    assert lrc.evaluations[-1][1] < 1.01 * lora.evaluations[-1][1]
    assert lrc.measured.peak < 0.8 * lora.measured.peak
