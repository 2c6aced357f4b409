"""LangChain's OpenAI classes: chat, streamed chat, structured output, embeddings, an error."""

import os

import openai
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

common = {"base_url": f"{os.environ['LATHE_URL']}/v1", "api_key": "none"}
model = os.environ["LATHE_MODEL"]

chat = ChatOpenAI(model=model, temperature=0, max_tokens=24, **common)
whole = chat.invoke("What is the capital of France?")
assert "Paris" in whole.content, whole
assert whole.usage_metadata["output_tokens"] <= 24
assert whole.response_metadata["finish_reason"] in ("stop", "length")
streamed = "".join(chunk.content for chunk in chat.stream("What is the capital of France?"))
assert streamed == whole.content, (streamed, whole.content)
several = chat.batch(["Say one.", "Say two."])
assert len(several) == 2


class Person(BaseModel):
    name: str
    age: int


structured = ChatOpenAI(model=model, temperature=0, max_tokens=120, **common)
found = structured.with_structured_output(Person, method="json_schema").invoke(
    "Ada is 36 years old. Give her name and age as JSON."
)
assert isinstance(found, Person), found

text = OpenAI(model=model, temperature=0, max_tokens=4, **common)
assert " Paris" in text.invoke("The capital of France is")

embeddings = OpenAIEmbeddings(model="all-minilm-l6-v2", check_embedding_ctx_length=False, **common)
first, second, other = embeddings.embed_documents(["a cat", "a kitten", "the stock market"])
near = sum(a * b for a, b in zip(first, second, strict=True))
far = sum(a * b for a, b in zip(first, other, strict=True))
assert near > far, (near, far)

try:
    ChatOpenAI(model="unknown", max_retries=0, **common).invoke("a")
except openai.NotFoundError as error:
    code = error.code
else:
    raise AssertionError("an unknown model answered")
assert code == "model_not_found", code
