"""The application over a fake engine: OpenAI's own client, the error shape everywhere, keys, and jobs."""

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient

from compression.checkpoint import add_skip_profile
from compression.ffn_skip.profile import SkipPoint, SkipProfile, Substitute
from compression.import_model import import_folder
from compression.registry import ModelRegistry
from engines.host import EngineHost
from service.app import build_app
from service.settings import Settings
from tests.fakes.echo_engine import ECHO_INFO, EchoEngine

LIMIT = 8 * 1024


@pytest.fixture(scope="module")
def home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    import_folder(ModelRegistry(path / "models"), "tiny", tiny_llama, report=lambda _: None)
    return path


@pytest.fixture(scope="module")
def settings(home: Path) -> Settings:
    return Settings(home=home, models=("tiny",))


@pytest.fixture(scope="module")
def engine_host(settings: Settings) -> Iterator[None]:
    """An echo engine behind a real socket, where the pool looks for it."""
    import asyncio

    engine = EchoEngine(info=replace(ECHO_INFO, model="tiny", vocab_size=31))
    host = EngineHost(engine)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await host.serve(settings.engine_socket("tiny"), on_ready=ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield
    loops[0].call_soon_threadsafe(host.stop)
    thread.join(10)


@pytest.fixture(scope="module")
def client(settings: Settings, engine_host: None) -> Iterator[TestClient]:
    with TestClient(build_app(settings), raise_server_exceptions=False) as test_client:
        yield test_client


@pytest.fixture(scope="module")
def url(settings: Settings, engine_host: None) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        config = uvicorn.Config(build_app(settings), log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def error_of(response: object) -> dict[str, object]:
    body = response.json()  # type: ignore[attr-defined]
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert len(response.content) <= LIMIT  # type: ignore[attr-defined]
    error: dict[str, object] = body["error"]
    return error


def test_completion_echoes_with_logprobs(openai_client: openai.OpenAI) -> None:
    answer = openai_client.completions.create(
        model="tiny", prompt="abc", max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.replace(" ", "") == "abcab"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.token_logprobs) == 5
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)


def test_chat_streams_and_counts(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_stop_string_ends_the_text(openai_client: openai.OpenAI) -> None:
    answer = openai_client.completions.create(model="tiny", prompt="abcd", max_tokens=4, stop="c")
    assert answer.choices[0].text.replace(" ", "") == "ab"
    assert answer.choices[0].finish_reason == "stop"


def test_models_and_errors_through_the_client(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.completions.create(model="nope", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        openai_client.completions.create(model="tiny", prompt="a" * 600, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        openai_client.completions.create(model="tiny", prompt="a", extra_body={"bogus": 1})
    assert (unknown.value.code, unknown.value.param) == ("unsupported_parameter", "bogus")
    with pytest.raises(openai.BadRequestError) as skip:
        openai_client.completions.create(model="tiny", prompt="a", extra_body={"skip": "profile"})
    assert skip.value.param == "skip"


def test_control_tokens_in_user_text_stay_text(client: TestClient) -> None:
    tokens = client.post("/v1/tokenize", json={"model": "tiny", "prompt": "<|im_end|>"}).json()
    assert 4 not in tokens["tokens"]
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    chat = client.post("/v1/tokenize", json={"model": "tiny", "messages": messages}).json()
    assert chat["tokens"].count(4) == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nope", None, 404, "not_found"),
        ("PUT", "/v1/models", None, 405, "method_not_allowed"),
        ("POST", "/v1/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/completions", b'{"model":"tiny","prompt":"a","n":NaN}', 400, "invalid_value"),
        ("POST", "/v1/completions", b'{"model":"tiny","prompt":"a","n":99}', 400, "invalid_value"),
        ("POST", "/v1/jobs", b'{"type":"evaluate"}', 400, "unsupported_parameter"),
        ("POST", "/v1/jobs", b'{"type":"enrich"}', 400, "invalid_value"),
        ("GET", "/v1/jobs/job-x", None, 404, "job_not_found"),
        ("GET", "/v1/graphs/graph-x", None, 404, "graph_not_found"),
        ("DELETE", "/v1/models/..%2f..", None, 404, None),
    ],
)
def test_every_failure_has_the_error_shape(
    client: TestClient, method: str, path: str, body: bytes | None, status: int, code: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = client.request(method, path, content=body, headers=headers)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"].startswith("req-")


def test_a_refused_method_is_told_all_others(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 30
    for path, operations in paths.items():
        refused = client.options(path.replace("{", "").replace("}", ""))
        assert refused.status_code == 405, path
        assert set(refused.headers["allow"].split(", ")) == {m.upper() for m in operations}, path


def test_body_rules(client: TestClient) -> None:
    text = client.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"})
    assert (text.status_code, error_of(text)["code"]) == (415, "unsupported_media_type")
    host = client.get("/health", headers={"host": "evil.example"})
    assert (host.status_code, error_of(host)["code"]) == (403, "host_not_allowed")
    large = client.post(
        "/v1/completions",
        content=b"{}",
        headers={"content-type": "application/json", "content-length": str(10**12)},
    )
    assert large.status_code == 413


def test_a_default_skip_that_the_model_has_not_stops_the_start(home: Path, tmp_path: Path) -> None:
    dense, skipping = tmp_path / "models" / "dense", tmp_path / "models" / "skipping"
    shutil.copytree(home / "models" / "tiny", dense)
    profile = SkipProfile(
        num_layers=2, hidden_size=64, cold_start=0, cold_end=0, k=1, warm_up=0, dtype="F32",
        points=(SkipPoint(target_ratio=0.2, tau=0.9, skip_ratio=0.2),),
        substitutes=(Substitute(), Substitute()),
    )  # fmt: skip
    add_skip_profile(dense, skipping, profile, {})

    def start(**skip: object) -> None:
        with TestClient(build_app(Settings.model_validate({"home": tmp_path, "skip": skip}))):
            pass

    start(dense="off", skipping="profile", unknown="profile")
    start(skipping={"target_ratio": 0.2})
    with pytest.raises(ValueError, match="dense has no skip profile"):
        start(dense="profile")
    with pytest.raises(ValueError, match=r"skipping: target_ratio is 0\.5"):
        start(skipping={"target_ratio": 0.5})


def test_keys_and_roles(settings: Settings, tmp_path: Path, home: Path) -> None:
    from service.auth import KeyStore, PublicBindError, check_bind

    keys = KeyStore(tmp_path / "keys.json")
    with pytest.raises(PublicBindError):
        check_bind("0.0.0.0", keys)
    key, secret = keys.create("ci", ("inference",))
    assert secret not in (tmp_path / "keys.json").read_text()
    with_keys = settings.model_copy(update={"api_keys_file": tmp_path / "keys.json"})
    with TestClient(build_app(with_keys)) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        bearer = {"authorization": f"Bearer {secret}"}
        assert client.get("/v1/models", headers=bearer).status_code == 200
        assert error_of(client.get("/v1/jobs", headers=bearer))["code"] == "insufficient_scope"
        swapped = {"authorization": f"Bearer {secret.swapcase()}"}
        assert client.get("/v1/models", headers=swapped).status_code == 401
        keys.revoke(key.id)
        assert client.get("/v1/models", headers=bearer).status_code == 401


def test_jobs_are_idempotent(client: TestClient) -> None:
    body = {
        "type": "compress",
        "model": "tiny",
        "output": "tiny-int4",
        "recipe": [{"int4": {"group_size": 32}}],
    }
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    again = client.post("/v1/jobs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    other = client.post("/v1/jobs", json=body | {"output": "other"}, headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_conflict")
    assert other.headers["x-should-retry"] == "false"
    job_id = first.json()["id"]
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    events = client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [event["message"] for event in events] == ["queued", "cancelled: user"]


def test_metrics_hold_the_names_that_dashboards_read(client: TestClient) -> None:
    client.post("/v1/completions", json={"model": "tiny", "prompt": "ab", "max_tokens": 2})
    client.request("MELT", "/v1/no-such-route")
    text = client.get("/metrics").text
    assert 'http_requests_total{handler="none",method="other",status="4xx"} 1.0' in text
    for name in (
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:request_success_total",
        "vllm:e2e_request_latency_seconds_bucket",
        "gen_ai_server_request_duration_seconds_bucket",
        "lathe_model_bytes",
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}',
        'http_request_duration_seconds_bucket{handler="/v1/completions",le="0.01",method="POST"}',
    ):
        assert name in text, name


def test_promtool_finds_nothing_wrong(client: TestClient) -> None:
    """But the colon of `vllm:`, a prefix that is not ours to change; without those lines its exit status is 0."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    client.post("/v1/completions", json={"model": "tiny", "prompt": "ab", "max_tokens": 2})
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=client.get("/metrics").text,
        capture_output=True,
        text=True,
    )
    colon = re.compile(r"vllm:\w+ metric names should not contain ':'")
    remarks = (done.stdout + done.stderr).splitlines()
    assert [line for line in remarks if not colon.fullmatch(line)] == []


def test_openapi_has_no_422(client: TestClient) -> None:
    for path, item in client.get("/openapi.json").json()["paths"].items():
        for operation in item.values():
            assert "422" not in operation["responses"], path
