"""Every setting, read once: flags, then LATHE_* variables, then lathe.toml, then these defaults."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PlainValidator, SecretStr
from pydantic.functional_validators import field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from engines.logs import LogLevel
from engines.protocol import Skip
from jobs.gpu import GpuPolicy
from jobs.logic import MAX_LEASE_SECONDS

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_EMBEDDING_MODEL = "all-minilm-l6-v2"


class Settings(BaseSettings):
    """Settings of one machine; shared by the API process, the engine hosts and the workers."""

    model_config = SettingsConfigDict(env_prefix="LATHE_", toml_file="lathe.toml", extra="forbid")

    home: Path = Field(default_factory=lambda: Path.home() / ".cache" / "lathe")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    redis_url: SecretStr | None = None
    api_keys_file: Path | None = None
    models: Annotated[tuple[str, ...], NoDecode] = (DEFAULT_MODEL, DEFAULT_EMBEDDING_MODEL)
    """Models that `lathe up` loads; a comma-separated list in the environment."""
    embedding_model: str = DEFAULT_EMBEDDING_MODEL
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Host header values accepted besides the loopback names and `host`."""
    log_level: LogLevel = "info"
    otlp_endpoint: str | None = Field(default=None, pattern="^https?://")
    """Base address of an OpenTelemetry collector that gets the traces, such as http://localhost:4318."""

    max_body_bytes: int = 32 * 2**20
    max_upload_bytes: int = 512 * 2**20
    max_loaded_models: int = Field(default=4, ge=0)
    """A registered model is loaded when it is asked for, while fewer than these are; 0 to load none that way."""
    max_num_queued_requests: int = Field(default=256, ge=1)
    max_num_seqs: int = Field(default=16, ge=1)
    default_max_tokens: int = Field(default=256, ge=1)
    """For a chat request that names no limit; OpenAI's completions default of 16 is kept."""
    skip: dict[str, Annotated[Skip, PlainValidator(Skip.from_json)]] = Field(default_factory=dict)
    """By model: how requests skip feed-forwards that do not say; "profile" or {"target_ratio": share}. JSON in the
    environment, a table in lathe.toml."""
    cost_per_million_tokens: float | None = Field(default=None, ge=0)
    """What estimates and usage reckon a token at, in whatever currency; without it they name no cost."""
    requests_per_minute: int = Field(default=0, ge=0)
    tokens_per_minute: int = Field(default=0, ge=0)
    max_open_requests: int = Field(default=0, ge=0)
    """Under way at once, streams included, in one API process."""
    job_seconds_per_day: int = Field(default=0, ge=0)
    """That jobs may hold a worker, and so its device, within 24 hours."""
    max_disk_bytes: int = Field(default=256 * 2**30, ge=0)
    """Of files, graphs and jobs' folders, and of the models and projectors that jobs made.

    These five are of one API key that has no limit of its own; 0 is no limit."""
    max_active_jobs: int = Field(default=100, ge=0)
    """Of one API key: queued, running or paused; 0 is no limit."""
    max_job_seconds: float = Field(default=7 * 24 * 3600.0, gt=0)
    """An attempt that runs longer is ended."""
    request_timeout_seconds: float = 600.0
    drain_seconds: float = 30.0

    job_lease_seconds: float = Field(default=60.0, gt=0, le=MAX_LEASE_SECONDS)
    job_heartbeat_seconds: float = 10.0
    job_cancel_grace_seconds: float = 5.0
    job_checkpoint_grace_seconds: float = 60.0
    """For a finetune job that is paused or cancelled to end its step and write a checkpoint."""
    job_gpu_policy: GpuPolicy = "sleep"
    """What a finetune job does about engines on the GPU: let them `sleep`, fail as `busy`, or `share` it with them."""

    @field_validator("models", "allowed_hosts", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    def default_skip(self, model: str) -> Skip:
        return self.skip.get(model, Skip())

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def projectors_dir(self) -> Path:
        return self.home / "projectors"

    @property
    def graphs_dir(self) -> Path:
        return self.home / "graphs"

    @property
    def prompts_dir(self) -> Path:
        """Prompts that users have registered."""
        return self.home / "prompts"

    @property
    def files_dir(self) -> Path:
        return self.home / "files"

    @property
    def jobs_dir(self) -> Path:
        """One folder per job: logs, checkpoints, artefacts."""
        return self.home / "jobs"

    @property
    def run_dir(self) -> Path:
        """Sockets and process ids of what runs now."""
        return self.home / "run"

    @property
    def database(self) -> Path:
        return self.home / "lathe.db"

    @property
    def cache_database(self) -> Path:
        """Enrichment results; may be deleted at any time."""
        return self.home / "cache.db"

    @property
    def limits_database(self) -> Path:
        """Of rate limits; may be deleted at any time."""
        return self.home / "limits.db"

    @property
    def usage_database(self) -> Path:
        """What every key has used."""
        return self.home / "usage.db"

    @property
    def keys_file(self) -> Path:
        return self.api_keys_file or self.home / "keys.json"

    def engine_socket(self, model: str) -> Path:
        return self.run_dir / f"{model}.sock"

    @property
    def supervisor_socket(self) -> Path:
        return self.run_dir / "supervisor.sock"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)
