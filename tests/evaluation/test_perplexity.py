"""Perplexity against a loop that asks for one token at a time, and what is refused."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.hf import load_model
from evaluation import perplexity
from evaluation.corpora import CORPORA, Corpus, CorpusError, load_corpus
from evaluation.perplexity import compare_models, measure_perplexity, tokenize

TEXT = "the quick brown fox jumps over the lazy dog " * 4


def corpus(text: str) -> Corpus:
    return Corpus(name="test", text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def naive(model: Any, ids: list[int], window: int, stride: int, max_windows: int) -> float:
    """exp of the mean loss, one forward pass per scored token, over the text that the protocol lets it see."""
    losses = []
    scored_up_to = 1
    for start in range(0, len(ids) - window + 1, stride)[:max_windows]:
        first = scored_up_to if stride < window else start + 1
        for position in range(first, start + window):
            with torch.no_grad():
                logits_V = model(torch.tensor([ids[start:position]])).logits[0, -1].double()
            losses.append(-float(logits_V.log_softmax(0)[ids[position]]))
        scored_up_to = start + window
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (16, 1), (2, 2)])
def test_it_equals_one_token_at_a_time(
    model: Any, tiny_llama: Path, window: int, stride: int
) -> None:
    ids, _ = tokenize(tiny_llama, corpus(TEXT))
    measured = measure_perplexity(
        model, tiny_llama, corpus(TEXT), window=window, stride=stride, max_windows=5
    )
    assert measured.value == pytest.approx(naive(model, ids, window, stride, 5), rel=1e-5)
    protocol = measured.protocol
    overlapping = window - 1 + 4 * stride
    assert protocol.num_tokens == (5 * (window - 1) if stride == window else overlapping)
    assert (protocol.num_windows, protocol.window, protocol.stride) == (5, window, stride)


def test_the_protocol_tells_texts_and_tokenizers_apart(model: Any, tiny_llama: Path) -> None:
    one, other = (
        measure_perplexity(model, tiny_llama, corpus(text), window=8, stride=8).protocol
        for text in (TEXT, TEXT + "x")
    )
    assert one.corpus_sha256 != other.corpus_sha256
    assert one.tokenizer_sha256 == other.tokenizer_sha256


def test_what_cannot_be_measured_is_refused(model: Any, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="a window needs 64"):
        measure_perplexity(model, tiny_llama, corpus("too short"), window=64, stride=64)
    for window, stride in ((8, 9), (8, 0), (1, 1)):
        with pytest.raises(ValueError, match="1 <= stride <= window"):
            measure_perplexity(model, tiny_llama, corpus(TEXT), window=window, stride=stride)


def test_progress_is_told_and_may_stop_it(model: Any, tiny_llama: Path) -> None:
    seen: list[tuple[int, int]] = []

    def on_window(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(
            model, tiny_llama, corpus(TEXT), window=8, stride=8, max_windows=4, on_window=on_window
        )
    assert seen == [(0, 4), (1, 4), (2, 4)]


@pytest.mark.parametrize("window", [2, 65, 128])
def test_two_models_are_compared_as_whole_distributions_would(
    model: Any, tiny_llama: Path, window: int
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    ids, _ = tokenize(tiny_llama, corpus(TEXT))
    found = compare_models(model, other, tiny_llama, corpus(TEXT), window=window, max_windows=1)
    targets_S = torch.tensor(ids[1:window])
    with torch.no_grad():
        p_SV, q_SV = (
            m(torch.tensor([ids[: window - 1]])).logits[0].double().softmax(dim=-1)
            for m in (model, other)
        )
    rows_S = torch.arange(window - 1)
    for measured, x_SV in ((found.before, p_SV), (found.after, q_SV)):
        expected = float(x_SV[rows_S, targets_S].log().mean().neg().exp())
        assert measured.value == pytest.approx(expected, rel=1e-5)
    kl = float((p_SV * (p_SV / q_SV).log()).sum(dim=-1).mean())
    assert found.kl_divergence == pytest.approx(kl, rel=1e-3)
    agreement = float((p_SV.argmax(dim=-1) == q_SV.argmax(dim=-1)).double().mean())
    assert found.top1_agreement == pytest.approx(agreement)


def test_a_corpus_has_a_name() -> None:
    assert "state-of-the-union" in CORPORA
    assert len(load_corpus("state-of-the-union").text) > 50_000
    with pytest.raises(CorpusError, match="no corpus 'nothing'"):
        load_corpus("nothing")


@pytest.mark.real_model
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    real_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    folder = real_home / "models" / "smollm2-135m"
    text = load_corpus("state-of-the-union").text
    monkeypatch.setattr(perplexity, "PIECE_CHARACTERS", 1000)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenize(folder, corpus(text))[0] == whole


@pytest.mark.real_model
def test_smollm2_against_transformers_own_loss(real_home: Path) -> None:
    folder = real_home / "models" / "smollm2-135m"
    speech = load_corpus("state-of-the-union")
    model = load_model(folder, dtype=torch.float32)
    measured = measure_perplexity(model, folder, speech, window=256, stride=256, max_windows=2)
    ids, _ = tokenize(folder, speech)
    windows_BS = torch.tensor([ids[:256], ids[256:512]])
    with torch.inference_mode():
        expected = math.exp(float(model(windows_BS, labels=windows_BS).loss))
    assert measured.value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("at_least", [1, 60, 300, 10_000])
def test_of_a_long_text_only_as_much_is_tokenized_as_is_needed(
    tiny_llama: Path, at_least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.perplexity.PIECE_CHARACTERS", len(TEXT))
    long = corpus("\n\n".join([TEXT] * 50))
    whole, sha256 = tokenize(tiny_llama, long)
    part, same = tokenize(tiny_llama, long, at_least=at_least)
    assert part == whole[: len(part)]
    assert same == sha256
    piece = len(whole) // 50 + 1
    assert min(at_least, len(whole)) <= len(part) <= max(at_least, 1) + piece
