"""What lm-eval must find: a small multiple-choice task, and its log-likelihoods by the engine in this process."""

import json
from pathlib import Path
from typing import Any

from service.settings import DEFAULT_MODEL

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
    from engines.protocol import ScoreRequest
    from engines.text import TextTokenizer

    checkpoint = home / "models" / DEFAULT_MODEL
    engine = NativeEngine.load(DEFAULT_MODEL, checkpoint, dtype=torch.bfloat16)
    tokenizer = TextTokenizer.load(checkpoint)
    rows: list[dict[str, Any]] = []
    for number, (context, choices) in enumerate(QUESTIONS):
        context_ids = tuple(tokenizer.encode(context))
        scores = []
        for choice in choices:
            continuation = tuple(tokenizer.encode(context + choice))[len(context_ids) :]
            request = ScoreRequest(
                request_id=f"{number}", context_ids=context_ids, continuation_ids=(continuation,)
            )
            scores.append(engine.score(request).scores[0].logprob)
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
