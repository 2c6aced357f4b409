"""LiteLLM as a client: chat, streamed chat, text, embeddings, and its mapping of our errors."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network
import litellm

common = {"api_base": f"{os.environ['LATHE_URL']}/v1", "api_key": "none"}
model = f"openai/{os.environ['LATHE_MODEL']}"
messages = [{"role": "user", "content": "What is the capital of France?"}]

whole = litellm.completion(model=model, messages=messages, temperature=0, max_tokens=24, **common)
text = whole.choices[0].message.content
assert "Paris" in text, whole
assert whole.usage.completion_tokens <= 24
stream = litellm.completion(
    model=model, messages=messages, temperature=0, max_tokens=24, stream=True, **common
)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text

completion = litellm.text_completion(
    model=f"text-completion-openai/{os.environ['LATHE_MODEL']}",
    prompt="The capital of France is",
    temperature=0,
    max_tokens=4,
    **common,
)
assert " Paris" in completion.choices[0].text, completion

vectors = litellm.embedding(model="openai/all-minilm-l6-v2", input=["a", "b"], **common)
assert [len(row["embedding"]) for row in vectors.data] == [384, 384]

for wrong, kind in (
    ({"model": "openai/unknown"}, litellm.NotFoundError),
    ({"max_tokens": 10**6}, litellm.BadRequestError),
):
    try:
        litellm.completion(
            **{"model": model, "messages": messages, "num_retries": 0} | common | wrong
        )
    except kind:
        continue
    raise AssertionError(f"{wrong} was answered")
