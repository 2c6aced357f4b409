"""lm-eval over HTTP (`local-completions`) finds the log-likelihoods and the accuracy that the engine has in process."""

import json
import os
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
import lm_eval
from lm_eval.models.openai_completions import LocalCompletionsAPI

TOLERANCE = 1e-4
folder = Path(os.environ["CONFORMANCE_DATA"])
expected = json.loads((folder / "expected.json").read_text())
(folder / "cities.yaml").write_text(
    f"""
task: lathe_conformance
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "task.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
)
model = LocalCompletionsAPI(
    base_url=f"{os.environ['LATHE_URL']}/v1/completions",
    model=os.environ["LATHE_MODEL"],
    tokenizer=os.environ["LATHE_CHECKPOINT"],
    tokenizer_backend="huggingface",
    tokenized_requests=False,
    num_concurrent=1,
)
results = lm_eval.simple_evaluate(
    model=model,
    tasks=["lathe_conformance"],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
    log_samples=True,
    bootstrap_iters=0,
)
assert results is not None
worst = 0.0
samples = sorted(results["samples"]["lathe_conformance"], key=lambda sample: sample["doc_id"])
assert len(samples) == len(expected["rows"])
for sample, row in zip(samples, expected["rows"], strict=True):
    assert sample["doc"]["context"] == row["context"]
    found = [float(answer[0]) for answer in sample["filtered_resps"]]
    worst = max(worst, *(abs(a - b) for a, b in zip(found, row["logprobs"], strict=True)))
accuracy = results["results"]["lathe_conformance"]["acc,none"]
print(
    f"accuracy {accuracy:.4f}, in process {expected['accuracy']:.4f}; largest difference {worst:.2e}"
)
assert worst <= TOLERANCE, worst
assert accuracy == expected["accuracy"]
