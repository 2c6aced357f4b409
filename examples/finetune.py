"""Finetune the default model on a file of examples, through OpenAI's own client, and ask the result something.

`python examples/finetune.py examples.jsonl "What is a lathe?"`, against the service at LATHE_URL.
"""

import os
import sys
import time
from pathlib import Path

import openai

MODEL = "smollm2-135m"
POLL_SECONDS = 2.0


def main(examples: str, question: str) -> None:
    url = os.environ.get("LATHE_URL", "http://127.0.0.1:8000")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("LATHE_API_KEY", "none"))
    file = client.files.create(file=Path(examples), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="mine")
    told: set[str] = set()
    while job.finished_at is None:
        time.sleep(POLL_SECONDS)
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=20).data):
            if event.id not in told:
                print(event.message)
                told.add(event.id)
    if job.fine_tuned_model is None:
        raise SystemExit(job.error.message if job.error else job.status)
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": question}]
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
