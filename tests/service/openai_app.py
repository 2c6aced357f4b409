"""The OpenAI routes behind the service's middleware, with engines that a test scripts and a tokenizer built here."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Self, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from compression.checkpoint import Manifest, ModelKind, write_manifest
from compression.registry import ModelRegistry
from engines.protocol import GenerateRequest
from engines.text import TextTokenizer
from service.auth import KeyStore
from service.deps import AppState
from service.engine_pool import EnginePool
from service.errors import ApiError
from service.metrics import Metrics
from service.middleware import RequestMiddleware
from service.routes import chat, completions, embeddings, score, tokenize
from service.settings import Settings
from service.supervisor_client import SupervisorClient
from service.tokenizers import TokenizerCache
from tests.fakes.echo_engine import ECHO_INFO
from tests.fakes.fake_async_engine import FakeAsyncEngine

START, END = 1, 2
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DECODER, ENCODER = "echo", "encoder"


@cache
def decoder_json() -> str:
    """GPT-2's kind: every byte a token, some merges, and SmolLM2's control tokens (END is the echo engine's EOS)."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(["the lathe turns the wood and the wood turns round"], trainer)
    return str(built.to_str())


@cache
def encoder_json() -> str:
    """BERT's kind: whole words between [CLS] and [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["[CLS]", "[SEP]"])
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(built.to_str())


class Service:
    """The application, its engines and a client.

    Attributes:
        engine, encoder: what serves `DECODER` and `ENCODER`.
        text: the decoder's tokenizer.
    """

    def __init__(self, home: Path, **setting: Any) -> None:
        self.text = TextTokenizer(decoder_json())
        self.engine = FakeAsyncEngine(info=replace(ECHO_INFO, vocab_size=self.text.vocab_size))
        encoder_info = replace(
            ECHO_INFO, model=ENCODER, kind="encoder", max_model_len=8, vocab_size=7, unsupported=()
        )
        self.encoder = FakeAsyncEngine(info=encoder_info)
        self.settings = Settings(home=home, default_max_tokens=20, **setting)
        config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
        add_model(self.settings.models_dir / DECODER, "decoder", decoder_json(), config)
        add_model(self.settings.models_dir / ENCODER, "encoder", encoder_json(), {})
        registry = ModelRegistry(self.settings.models_dir)
        pool = EnginePool(
            self.settings, registry, SupervisorClient(self.settings.supervisor_socket)
        )
        pool.add(DECODER, self.engine)
        pool.add(ENCODER, self.encoder)
        self.metrics = Metrics()
        self.state = AppState(
            settings=self.settings,
            registry=registry,
            engines=pool,
            jobs=cast(Any, None),
            files=cast(Any, None),
            keys=KeyStore(self.settings.keys_file),
            metrics=self.metrics,
            tokenizers=TokenizerCache(),
            graphs=cast(Any, None),
            cache=cast(Any, None),
            enricher=cast(Any, None),
            text_vectors=cast(Any, None),
        )
        self.app = build_test_app(self.state)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def __enter__(self) -> Self:
        self._entered: AbstractContextManager[Any] = self.client
        self._entered.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._entered.__exit__(*details)

    def replies(self, *texts: str, end: bool = True) -> None:
        """The engine's choice i answers texts[i]; then EOS, or nothing more."""

        def reply(request: GenerateRequest) -> Iterable[int]:
            index = int(request.request_id.rpartition("-")[2])
            ids = self.text.encode(texts[index % len(texts)])
            return [*ids, END] if end else ids

        self.engine.reply = reply

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(f"/v1/{path}", json={"model": DECODER} | body)

    def complete(self, **body: Any) -> Any:
        return self.post("completions", **({"prompt": "the wood"} | body))

    def chat(self, **body: Any) -> Any:
        return self.post(
            "chat/completions", **({"messages": [{"role": "user", "content": "Hi"}]} | body)
        )

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


def add_model(folder: Path, kind: ModelKind, tokenizer: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    manifest = Manifest(kind=kind, source={}, matrices=(), other_tensors={})
    write_manifest(folder, manifest)


def build_test_app(state: AppState) -> FastAPI:
    """The routers of these tests, and what the application does with refused bodies."""
    app = FastAPI()
    app.state.lathe = state
    for module in (completions, chat, embeddings, score, tokenize):
        app.include_router(module.router)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        detail = error.errors()[0]
        unknown = detail["type"] == "extra_forbidden"
        code = "unsupported_parameter" if unknown else "invalid_value"
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"][1:]
        )
        refused = ApiError(code, detail["msg"], place.lstrip(".") or None)
        return JSONResponse(refused.body(), refused.status)

    app.add_middleware(RequestMiddleware, settings=state.settings)
    return app


def error_of(response: Any, status: int = 400) -> tuple[str, str | None]:
    """The error's code and param; its shape is checked."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"], error["param"]


def events(response: Any) -> list[Any]:
    """Data of an SSE answer; `[DONE]` as it is."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    data = [part.removeprefix("data: ") for part in parts]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
