"""What lm-eval must find: a small multiple-choice task, and its log-likelihoods by the engine in this process."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.settings import DEFAULT_MODEL

if TYPE_CHECKING:
    from engines.engine import NativeEngine

QUESTIONS = [
    ("The capital of France is", [" Paris", " Berlin", " Madrid", " Rome"]),
    ("The capital of Germany is", [" Berlin", " Paris", " Vienna", " Warsaw"]),
    ("The capital of Italy is", [" Rome", " Milan", " Athens", " Lisbon"]),
    ("The capital of Japan is", [" Tokyo", " Kyoto", " Beijing", " Seoul"]),
    ("Water freezes at zero degrees", [" Celsius", " Kelvin", " Newton", " Pascal"]),
    ("The opposite of hot is", [" cold", " warm", " red", " tall"]),
    ("Two plus two is", [" four", " five", " three", " nine"]),
    ("The sun rises in the", [" east", " west", " north", " south"]),
    ("Fish live in", [" water", " trees", " the sky", " books"]),
    ("A week has", [" seven days", " five days", " nine days", " two days"]),
    ("Bees make", [" honey", " milk", " bread", " iron"]),
    ("The largest planet is", [" Jupiter", " Mars", " Venus", " Mercury"]),
    ("Ice is frozen", [" water", " sand", " air", " oil"]),
    ("The author of Hamlet is", [" Shakespeare", " Dickens", " Tolstoy", " Goethe"]),
    ("A triangle has", [" three sides", " four sides", " six sides", " no sides"]),
    ("Humans breathe", [" oxygen", " helium", " gold", " stone"]),
]


def write_expected(home: Path, folder: Path) -> None:
    """`task.jsonl` for lm-eval, `expected.json` with every log-likelihood and the accuracy."""
    import torch

    from engines.engine import NativeEngine
    from engines.text import TextTokenizer

    checkpoint = home / "models" / DEFAULT_MODEL
    engine = NativeEngine.load(DEFAULT_MODEL, checkpoint, dtype=torch.bfloat16)
    tokenizer = TextTokenizer.load(checkpoint)
    rows: list[dict[str, Any]] = []
    for number, (context, choices) in enumerate(QUESTIONS):
        num_context = len(tokenizer.encode(context))
        scores = []
        for choice in choices:
            logprobs = _prompt_logprobs(engine, tokenizer.encode(context + choice))
            scores.append(sum(logprobs[num_context:]))
        # the right answer stands first above; for lm-eval it moves about
        order = [(place + number) % len(choices) for place in range(len(choices))]
        rows.append(
            {
                "context": context,
                "choices": [choices[place] for place in order],
                "answer": order.index(0),
                "logprobs": [scores[place] for place in order],
            }
        )
    engine.close()
    right = sum(max(range(4), key=row["logprobs"].__getitem__) == row["answer"] for row in rows)
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"rows": rows, "accuracy": right / len(rows)}
    (folder / "expected.json").write_text(json.dumps(expected))


def _prompt_logprobs(engine: "NativeEngine", token_ids: list[int]) -> list[float]:
    """Of every token, by the pass that a service makes of an echoed prompt; 0 of the first."""
    from engines.protocol import GenerateRequest, SamplingParams

    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine.submit(GenerateRequest(request_id="echo", token_ids=tuple(token_ids), params=params))
    outputs = engine.step()
    while engine.has_work():
        outputs += engine.step()
    return [entry.logprob or 0.0 for entry in outputs[-1].prompt_logprobs or ()]
