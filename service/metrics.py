"""Every metric that Lathe exports: names, labels and buckets. Nothing is declared elsewhere.

Three families: the `vllm:` subset that existing dashboards, the Kubernetes inference extension and KEDA read
(exactly their
names, labels and buckets, and none of our invention); OpenTelemetry's GenAI names; our own under `lathe_`.
Labels come from
the model registry and fixed sets, never from a request.
"""

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.protocol import EngineInfo, EngineStats
from jobs.open import STORE_ERRORS
from jobs.store import JobCounts

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
)  # fmt: skip
_E2E = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_N = (1, 2, 5, 10, 20)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_GEN_AI_DURATION = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
_GEN_AI_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_GEN_AI_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_GEN_AI_TOKENS = tuple(4**k for k in range(14))
_VLLM_LABELS = ("model_name", "engine")
_GEN_AI_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
PROVIDER = "lathe"
_Reading = tuple[str, str, Callable[[EngineStats], float]]
logger = logging.getLogger("lathe.metrics")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The series of one application, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one series more for each histogram, read by nothing
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._vllm_histograms()
        self._gen_ai()
        self._request_success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_VLLM_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._http_requests = Counter(
            "http_requests",
            "Answers, by route and class of status.",
            ("method", "handler", "status"),
            registry=self.registry,
        )
        self._http_duration = self._histogram(
            "http_request_duration_seconds",
            "From the headers of a request to the end of its answer.",
            _GEN_AI_DURATION,
            ("method", "handler"),
        )
        self._enrich_items = Counter(
            "lathe_enrich_items",
            "Enriched items, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self._enrich_cache_hits = Counter(
            "lathe_enrich_cache_hits",
            "Cache hits of enrichment.",
            ("layer",),
            registry=self.registry,
        )
        self._ffn_rows = Counter(
            "lathe_ffn_rows",
            "FFN rows of requests that may skip.",
            ("model",),
            registry=self.registry,
        )
        self._ffn_rows_skipped = Counter(
            "lathe_ffn_rows_skipped", "FFN rows skipped.", ("model",), registry=self.registry
        )
        self._cancelled = Counter(
            "lathe_requests_cancelled",
            "Requests whose client left before the end.",
            ("model",),
            registry=self.registry,
        )

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = _VLLM_LABELS
    ) -> Histogram:
        return Histogram(name, text, tuple(labels), buckets=tuple(buckets), registry=self.registry)

    def http_answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Args: route: as it was declared, with names in place of ids; None of a path that is none."""
        method = method if method in _METHODS else "other"
        handler = route or "none"
        self._http_requests.labels(method, handler, f"{status // 100}xx").inc()
        self._http_duration.labels(method, handler).observe(seconds)

    def _vllm_histograms(self) -> None:
        make = self._histogram
        self._ttft = make("vllm:time_to_first_token_seconds", "Time to first token.", _TTFT)
        self._inter_token = make(
            "vllm:inter_token_latency_seconds", "Time between tokens.", _INTER_TOKEN
        )
        self._tpot = make(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per output token of a request.",
            _INTER_TOKEN,
        )
        self._e2e = make("vllm:e2e_request_latency_seconds", "Whole request.", _E2E)
        self._queue = make("vllm:request_queue_time_seconds", "Waiting for the first step.", _E2E)
        self._prefill = make(
            "vllm:request_prefill_time_seconds", "First step to first token.", _E2E
        )
        self._decode = make("vllm:request_decode_time_seconds", "First to last token.", _E2E)
        self._prompt_len = make("vllm:request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self._generation_len = make("vllm:request_generation_tokens", "Generated tokens.", _TOKENS)
        self._max_tokens = make("vllm:request_params_max_tokens", "max_tokens asked for.", _TOKENS)
        self._n = make("vllm:request_params_n", "n asked for.", _N)

    def _gen_ai(self) -> None:
        make = self._histogram
        labels = _GEN_AI_LABELS
        self._gen_ai_duration = make(
            "gen_ai_server_request_duration_seconds", "Whole request.", _GEN_AI_DURATION, labels
        )
        self._gen_ai_ttft = make(
            "gen_ai_server_time_to_first_token_seconds", "To first token.", _GEN_AI_TTFT, labels
        )
        self._gen_ai_tpot = make(
            "gen_ai_server_time_per_output_token_seconds", "Per token.", _GEN_AI_TPOT, labels
        )
        self._gen_ai_tokens = make(
            "gen_ai_client_token_usage",
            "Tokens of a request, by type.",
            _GEN_AI_TOKENS,
            (*labels, "gen_ai_token_type"),
        )

    def request_started(self, model: str, *, max_tokens: int, n: int) -> None:
        self._max_tokens.labels(model, "0").observe(max_tokens)
        self._n.labels(model, "0").observe(n)

    def observe_ttft(self, model: str, operation: str, seconds: float) -> None:
        self._ttft.labels(model, "0").observe(seconds)
        self._gen_ai_ttft.labels(operation, PROVIDER, model).observe(seconds)

    def observe_inter_token(self, model: str, seconds: float) -> None:
        self._inter_token.labels(model, "0").observe(seconds)

    def request_finished(
        self,
        model: str,
        operation: str,
        *,
        finish_reason: str,
        prompt_tokens: int,
        generation_tokens: int,
        e2e_seconds: float,
        decode_seconds: float | None = None,
        ffn_rows_skipped: int = 0,
        ffn_rows_total: int = 0,
        queue_seconds: float | None = None,
        prefill_seconds: float | None = None,
    ) -> None:
        """Count one choice of a generation, or one embedding or scoring request (no decode time)."""
        self._e2e.labels(model, "0").observe(e2e_seconds)
        self._prompt_len.labels(model, "0").observe(prompt_tokens)
        self._request_success.labels(model, "0", finish_reason).inc()
        self._gen_ai_duration.labels(operation, PROVIDER, model).observe(e2e_seconds)
        self._gen_ai_tokens.labels(operation, PROVIDER, model, "input").observe(prompt_tokens)
        if decode_seconds is not None:
            self._generation_len.labels(model, "0").observe(generation_tokens)
            self._decode.labels(model, "0").observe(decode_seconds)
            self._gen_ai_tokens.labels(operation, PROVIDER, model, "output").observe(
                generation_tokens
            )
            if generation_tokens > 1:
                per_token = decode_seconds / (generation_tokens - 1)
                self._tpot.labels(model, "0").observe(per_token)
                self._gen_ai_tpot.labels(operation, PROVIDER, model).observe(per_token)
        if queue_seconds is not None and prefill_seconds is not None:
            self._queue.labels(model, "0").observe(queue_seconds)
            self._prefill.labels(model, "0").observe(prefill_seconds)
        if ffn_rows_total:
            self._ffn_rows.labels(model).inc(ffn_rows_total)
            self._ffn_rows_skipped.labels(model).inc(ffn_rows_skipped)

    def request_cancelled(self, model: str) -> None:
        self._cancelled.labels(model).inc()

    def enrich_item(self, outcome: str) -> None:
        self._enrich_items.labels(outcome).inc()

    def enrich_cache_hit(self, layer: str) -> None:
        self._enrich_cache_hits.labels(layer).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Gauges and counters that the engines keep; read when scraped from the pool's last poll.

    Args:
        engines: model id to its information and newest statistics.
        sizes: model id to (parameters, bytes on disk, bytes ratio to its source or None) of every registered model.
        restarts: model id to automatic restarts of its host.
        readiness: model id to whether it is ready, of those that ought to be.
    """

    def __init__(
        self,
        engines: Callable[[], dict[str, tuple[EngineInfo, EngineStats]]],
        sizes: Callable[[], dict[str, tuple[int, int, float | None]]],
        restarts: Callable[[], dict[str, int]],
        readiness: Callable[[], dict[str, bool]],
    ) -> None:
        self._engines = engines
        self._sizes = sizes
        self._restarts = restarts
        self._readiness = readiness

    def collect(self) -> Iterable[Metric]:
        engines = self._engines()
        stats = {model: pair[1] for model, pair in engines.items()}
        gauges: tuple[_Reading, ...] = (
            ("num_requests_running", "Requests being run.", lambda s: s.num_requests_running),
            ("num_requests_waiting", "Requests waiting.", lambda s: s.num_requests_waiting),
            ("kv_cache_usage_perc", "KV cache in use, 0 to 1.", lambda s: s.kv_cache_usage_ratio),
        )
        for name, text, gauge in gauges:
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=_VLLM_LABELS)
            for model, one in stats.items():
                family.add_metric((model, "0"), gauge(one))
            yield family
        readings: tuple[_Reading, ...] = (
            ("prompt_tokens", "Prompt tokens computed.", lambda s: s.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", lambda s: s.generation_tokens_total),
            ("num_preemptions", "Preemptions.", lambda s: s.preemptions_total),
            ("prefix_cache_queries", "Tokens looked up.", lambda s: s.prefix_cache_queries_total),
            ("prefix_cache_hits", "Tokens found.", lambda s: s.prefix_cache_hits_total),
        )
        for name, text, counter in readings:
            counters = CounterMetricFamily(f"vllm:{name}", text, labels=_VLLM_LABELS)
            for model, one in stats.items():
                counters.add_metric((model, "0"), counter(one))
            yield counters
        yield from self._model_families(engines)

    def _model_families(
        self, engines: dict[str, tuple[EngineInfo, EngineStats]]
    ) -> Iterable[Metric]:
        resident = GaugeMetricFamily(
            "lathe_model_resident_bytes", "Weights as held in memory.", labels=("model",)
        )
        rss = GaugeMetricFamily(
            "lathe_engine_rss_bytes", "Resident memory of the engine host.", labels=("model",)
        )
        for model, (info, stats) in engines.items():
            resident.add_metric((model,), info.resident_bytes)
            rss.add_metric((model,), stats.rss_bytes)
        parameters = GaugeMetricFamily(
            "lathe_model_parameters", "Parameters that the model stands for.", labels=("model",)
        )
        size = GaugeMetricFamily(
            "lathe_model_bytes", "Bytes of tensors on disk.", labels=("model",)
        )
        ratio = GaugeMetricFamily(
            "lathe_model_compression_ratio", "Bytes against the source model.", labels=("model",)
        )
        loaded = GaugeMetricFamily(
            "lathe_model_loaded", "1 if an engine serves it.", labels=("model",)
        )
        for model, (count, num_bytes, bytes_ratio) in self._sizes().items():
            parameters.add_metric((model,), count)
            size.add_metric((model,), num_bytes)
            loaded.add_metric((model,), float(model in engines))
            if bytes_ratio is not None:
                ratio.add_metric((model,), bytes_ratio)
        restarts = CounterMetricFamily(
            "lathe_engine_restarts", "Automatic restarts of the host.", labels=("model",)
        )
        for model, count in self._restarts().items():
            restarts.add_metric((model,), count)
        ready = GaugeMetricFamily(
            "lathe_model_ready", "1 if it is ready, of models that ought to be.", labels=("model",)
        )
        for model, is_ready in self._readiness().items():
            ready.add_metric((model,), float(is_ready))
        yield from (resident, rss, parameters, size, ratio, loaded, restarts, ready)


class DiskCollector(Collector):
    """The disk under LATHE_HOME."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def collect(self) -> Iterable[Metric]:
        if not self._home.is_dir():  # nothing was ever written
            return
        usage = shutil.disk_usage(self._home)
        yield GaugeMetricFamily("lathe_disk_bytes", "Of the disk of LATHE_HOME.", value=usage.total)
        yield GaugeMetricFamily("lathe_disk_free_bytes", "Free on it.", value=usage.free)


class JobCollector(Collector):
    """Jobs and workers, read from the job store when scraped."""

    def __init__(
        self, counts: Callable[[], JobCounts], worker_ages: Callable[[], dict[str, float]]
    ) -> None:
        self._counts = counts
        self._worker_ages = worker_ages

    def collect(self) -> Iterable[Metric]:
        try:
            counts, worker_ages = self._counts(), self._worker_ages()
        except STORE_ERRORS as error:  # the others' metrics are wanted then all the more
            logger.warning("no metrics of jobs: the store does not answer (%s)", error)
            return
        jobs = GaugeMetricFamily(
            "lathe_jobs", "Jobs by type and status.", labels=("type", "status")
        )
        for (job_type, status), count in counts.by_type_and_status.items():
            jobs.add_metric((job_type, status), count)
        oldest = GaugeMetricFamily(
            "lathe_job_queue_oldest_seconds",
            "Age of the oldest queued job.",
            value=counts.oldest_queued_seconds,
        )
        lost = CounterMetricFamily(
            "lathe_job_lease_lost", "Leases that ran out.", value=counts.lease_lost_total
        )
        ages = GaugeMetricFamily(
            "lathe_worker_heartbeat_age_seconds", "Since a worker was seen.", labels=("worker",)
        )
        for worker, age in worker_ages.items():
            ages.add_metric((worker,), age)
        yield from (jobs, oldest, lost, ages)
