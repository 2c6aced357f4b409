"""The `lathe` commands that talk to a running service over HTTP."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compression.plan import Plan
    from compression.recipe import Calibration, Recipe
    from service.api_client import ApiClient

POLL_SECONDS = 0.3

url_option = click.option(
    "--url",
    envvar="LATHE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The service.",
)


@contextmanager
def connected(url: str) -> Iterator["ApiClient"]:
    """A client with the key of LATHE_API_KEY; its errors end the command with one line."""
    import os

    from service.api_client import ApiClient, ServiceError

    try:
        with ApiClient(url, os.environ.get("LATHE_API_KEY")) as client:
            yield client
    except ServiceError as error:
        raise click.ClickException(str(error)) from None


@click.group()
def models() -> None:
    """Models of a running service: list, show, load, restart, unload, delete.

    \b
    Example:
      lathe models list
    """


@models.command("list")
@url_option
def list_models(url: str) -> None:
    """List the installed models and whether they are loaded.

    \b
    Example:
      lathe models list
    """
    from service.job_view import human_bytes, table

    with connected(url) as client:
        found = client.get("/v1/models")["data"]
    rows = [["id", "state", "kind", "parameters", "size", "made from"]]
    for model in found:
        size = human_bytes(model["bytes"])
        parameters = f"{model['parameters']:,}"
        parent = model["parent"] or "-"
        rows.append([model["id"], model["state"], model["kind"], parameters, size, parent])
    _echo(table(rows) if found else ["no models; see `lathe import --help`"])


@models.command("show")
@click.argument("model")
@url_option
def show_model(model: str, url: str) -> None:
    """Show a model as JSON: recipe, sizes, evaluations.

    \b
    Example:
      lathe models show smollm2-135m-int4
    """
    with connected(url) as client:
        _echo_json(client.get(f"/v1/models/{_segment(model)}"))


@models.command("load")
@click.argument("model")
@url_option
def load_model(model: str, url: str) -> None:
    """Load a model, and wait until it answers.

    \b
    Example:
      lathe models load smollm2-135m-int4
    """
    with connected(url) as client:
        loaded = client.post(f"/v1/models/{_segment(model)}/load?wait=true")
    click.echo(f"{model}: {loaded['state']}")


@models.command("unload")
@click.argument("model")
@url_option
def unload_model(model: str, url: str) -> None:
    """Unload a model: its process ends and its memory is free.

    \b
    Example:
      lathe models unload smollm2-135m-int4
    """
    with connected(url) as client:
        client.post(f"/v1/models/{_segment(model)}/unload")
    click.echo(f"unloaded {model}")


@models.command("restart")
@click.argument("model")
@url_option
def restart_model(model: str, url: str) -> None:
    """Give a model a new process once what runs on it has ended, and wait until it answers.

    \b
    Example:
      lathe models restart smollm2-135m-int4
    """
    with connected(url) as client:
        restarted = client.post(f"/v1/models/{_segment(model)}/restart?wait=true")
    click.echo(f"{model}: {restarted['state']}")


@models.command("delete")
@click.argument("model")
@click.option("--yes", is_flag=True, help="Do not ask.")
@url_option
def delete_model(model: str, yes: bool, url: str) -> None:
    """Delete a model from the disk. It must not be loaded.

    \b
    Example:
      lathe models delete smollm2-135m-int4 --yes
    """
    if not yes:
        click.confirm(f"Delete {model} from the disk?", abort=True)
    with connected(url) as client:
        client.delete(f"/v1/models/{_segment(model)}")
    click.echo(f"deleted {model}")


@click.command()
@click.argument("model")
@click.option("--output", help="Id of the compressed model; needed unless --plan is given.")
@click.option(
    "--recipe",
    default='[{"int4": {"group_size": 64}}]',
    show_default=True,
    help="Stages as YAML or JSON, or the path of a file that holds them.",
)
@click.option("--calibration", help='YAML or JSON, such as \'{"corpus": "state-of-the-union"}\'.')
@click.option("--max-perplexity-ratio", type=float, help="Refuse the result if it loses more.")
@click.option("--min-top1-agreement", type=float, help="Refuse it if it agrees less often.")
@click.option("--plan", is_flag=True, help="Only say what it would give, before any work.")
@click.option("--detach", is_flag=True, help="Print the job's id and return.")
@url_option
def compress(
    model: str,
    output: str | None,
    recipe: str,
    calibration: str | None,
    max_perplexity_ratio: float | None,
    min_top1_agreement: float | None,
    plan: bool,
    detach: bool,
    url: str,
) -> None:
    """Compress a model as a job of the service, and report what was gained and lost.

    \b
    Examples:
      lathe compress smollm2-135m --output smollm2-135m-int4
      lathe compress smollm2-135m --recipe '[{welore: {err: 0.2}}, {int4: {method: gptq}}]' --plan
      lathe compress smollm2-135m --output small --recipe recipe.yaml --max-perplexity-ratio 1.5
    """
    stages = _yaml(recipe, "--recipe")
    settings = None if calibration is None else _yaml(calibration, "--calibration")
    if plan:
        with connected(url) as client:
            _echo(_plan_lines(client.get(f"/v1/models/{_segment(model)}"), stages, settings))
        return
    if output is None:
        raise click.UsageError("--output is needed")
    limits = {
        "max_perplexity_ratio": max_perplexity_ratio,
        "min_top1_agreement": min_top1_agreement,
    }
    gate = {name: limit for name, limit in limits.items() if limit is not None}
    body: dict[str, Any] = {"type": "compress", "model": model, "output": output, "recipe": stages}
    body |= {"calibration": settings} if settings is not None else {}
    body |= {"gate": gate} if gate else {}
    with connected(url) as client:
        job = client.post("/v1/jobs", body)
        click.echo(job["id"])
        if not detach:
            _follow_to_the_end(client, job["id"])


@click.command("calibrate-skip")
@click.argument("model")
@click.option("--output", required=True, help="Id of the model with the profile.")
@click.option(
    "--target-ratio",
    "target_ratios",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    help="Share of feed-forward rows to skip; several make a profile of several. [default: 0.1 0.2 0.25 0.3]",
)
@click.option(
    "--max-perplexity-ratio", type=float, help="Offer no share that loses more. [default: 1.5]"
)
@click.option("--no-substitutes", is_flag=True, help="Skip as published, with nothing instead.")
@click.option("--detach", is_flag=True, help="Print the job's id and return.")
@url_option
def calibrate_skip(
    model: str,
    output: str,
    target_ratios: tuple[float, ...],
    max_perplexity_ratio: float | None,
    no_substitutes: bool,
    detach: bool,
    url: str,
) -> None:
    """Find out which feed-forwards of a model may be skipped while it decodes, as a job of the service.

    \b
    Example:
      lathe calibrate-skip smollm2-135m --output smollm2-135m-skip --target-ratio 0.1 --target-ratio 0.2
    """
    body: dict[str, Any] = {"type": "calibrate_skip", "model": model, "output": output}
    if target_ratios:
        body["target_ratios"] = list(target_ratios)
    if max_perplexity_ratio is not None:
        body["gate"] = {"max_perplexity_ratio": max_perplexity_ratio}
    if no_substitutes:
        body["substitutes"] = False
    with connected(url) as client:
        job = client.post("/v1/jobs", body)
        click.echo(job["id"])
        if not detach:
            _follow_to_the_end(client, job["id"])


@click.command()
@click.argument("model")
@click.argument("training_file")
@click.option("--validation-file", help="Examples to evaluate on; else a share is kept back.")
@click.option("--method", default="qgalore", show_default=True, help="See docs/training.md.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting.")
@click.option("--suffix", help="Part of the new model's id.")
@click.option("--detach", is_flag=True, help="Print the job's id and return.")
@url_option
def finetune(
    model: str,
    training_file: str,
    validation_file: str | None,
    method: str,
    settings: tuple[str, ...],
    suffix: str | None,
    detach: bool,
    url: str,
) -> None:
    """Train a model on examples, as a job of the service. Files are local ones or ids of uploaded ones.

    \b
    Examples:
      lathe finetune smollm2-135m examples.jsonl --set n_epochs=3
      lathe finetune smollm2-135m file-0123456789abcdef01234567 --method lora --set rank=16 --set max_steps=100
    """
    from training.spec import METHODS

    options = {name: _setting(value) for name, value in map(_pair, settings)}
    own = {field for field in getattr(METHODS.get(method), "__dataclass_fields__", ())}
    chosen = {name: value for name, value in options.items() if name in own}
    chosen["hyperparameters"] = {n: value for n, value in options.items() if n not in own}
    seed = chosen["hyperparameters"].pop("seed", None)
    body = {
        "model": model,
        "suffix": suffix,
        "seed": seed,
        "method": {"type": method, method: chosen},
    }
    with connected(url) as client:
        body["training_file"] = _uploaded(client, training_file)
        if validation_file is not None:
            body["validation_file"] = _uploaded(client, validation_file)
        job = client.post("/v1/fine_tuning/jobs", body)
        click.echo(job["id"])
        if job["memory"] is not None:
            from service.job_view import human_bytes

            click.echo(f"predicted peak memory: {human_bytes(job['memory']['peak'])}", err=True)
        if not detach:
            _follow_to_the_end(client, job["id"])


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    return name, value


def _setting(text: str) -> Any:
    """A number or a word of JSON as such, anything else as text."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text


def _uploaded(client: "ApiClient", name: str) -> str:
    """The id of a file: given as such, or of a local file that is uploaded now."""
    if not Path(name).exists() and name.startswith("file-"):
        return name
    return str(_upload(client, Path(name), "fine-tune")["id"])


def _upload(client: "ApiClient", path: Path, purpose: str) -> Any:
    try:
        with path.open("rb") as file:
            return client.upload("/v1/files", path.name, file, {"purpose": purpose})
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None


@click.group()
def files() -> None:
    """Files of a running service: what jobs train and calibrate on.

    \b
    Example:
      lathe files upload examples.jsonl --purpose fine-tune
    """


@files.command("upload")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--purpose",
    type=click.Choice(["fine-tune", "calibration", "batch", "user_data"]),
    default="fine-tune",
    show_default=True,
)
@url_option
def upload_file(path: Path, purpose: str, url: str) -> None:
    """Upload a file; it is checked, and its id is printed.

    \b
    Examples:
      lathe files upload examples.jsonl
      lathe files upload texts.parquet --purpose calibration
    """
    with connected(url) as client:
        click.echo(_upload(client, path, purpose)["id"])


@files.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@url_option
def list_files(limit: int, url: str) -> None:
    """List the newest files.

    \b
    Example:
      lathe files list
    """
    from service.job_view import human_bytes, table

    with connected(url) as client:
        found = client.get("/v1/files", limit=limit)["data"]
    rows = [["id", "purpose", "size", "created", "name"]]
    for file in found:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(file["created_at"]))
        rows.append(
            [file["id"], file["purpose"], human_bytes(file["bytes"]), created, file["filename"]]
        )
    _echo(table(rows) if found else ["no files"])


@files.command("delete")
@click.argument("file_id")
@url_option
def delete_file(file_id: str, url: str) -> None:
    """Delete a file. Refused while a job needs it.

    \b
    Example:
      lathe files delete file-0123456789abcdef01234567
    """
    with connected(url) as client:
        client.delete(f"/v1/files/{_segment(file_id)}")
    click.echo(f"deleted {file_id}")


def _yaml(text: str, option: str) -> Any:
    """What an option says, itself or in the file that it names."""
    import yaml

    path = Path(text)
    try:
        if path.suffix in {".yaml", ".yml", ".json"}:
            text = path.read_text()
        return yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _plan_lines(model: dict[str, Any], stages: Any, calibration: Any) -> list[str]:
    from compression.plan import plan
    from compression.recipe import Calibration, RecipeError, parse_recipe
    from service.job_view import human_bytes, table

    try:
        recipe = parse_recipe(stages, done=model["recipe"])
    except RecipeError as error:
        raise click.ClickException(f"{error.param}: {error.message}") from None
    found = plan(model, recipe, Calibration(**calibration or {}))

    def shown(least: str, most: str) -> str:
        return least if least == most else f"{least} to {most}"

    parameters, size = found.parameters, found.bytes
    rows = [
        ["", "before", "after (predicted)"],
        [
            "parameters",
            f"{found.parameters_before:,}",
            shown(f"{parameters.least:,}", f"{parameters.most:,}"),
        ],
        [
            "bytes on disk",
            human_bytes(found.bytes_before),
            shown(human_bytes(size.least), human_bytes(size.most)),
        ],
    ]
    return [
        *table(rows),
        "",
        *table(_cost_rows(model, found, recipe, Calibration(**calibration or {}))),
    ]


def _cost_rows(
    model: dict[str, Any], found: "Plan", recipe: "Recipe", calibration: "Calibration"
) -> list[list[str]]:
    """Memory, and time on one core of this machine; beside it the same for a model that everybody knows."""
    from compression.cost import cost, llama_2_7b, measure_rates
    from compression.plan import plan
    from service.job_view import human_bytes

    rates = measure_rates(recipe)
    known = llama_2_7b()
    rows = [["compressing", "core seconds a block", "blocks", "core minutes", "peak memory"]]
    for name, shapes, peak in (
        (model["id"], model, found.peak_memory_bytes),
        ("Llama-2-7B's shapes", known, plan(known, recipe, calibration).peak_memory_bytes),
    ):
        needed = cost(shapes, recipe, calibration, rates)
        minutes = needed.block_seconds * needed.num_blocks / 60
        cells = [f"{needed.block_seconds:.2f}", str(needed.num_blocks), f"{minutes:.1f}"]
        rows.append([name, *cells, f"about {human_bytes(peak)}"])
    return rows


@click.group()
def jobs() -> None:
    """Jobs of a running service.

    \b
    Example:
      lathe jobs list
    """


@jobs.command("list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@url_option
def list_jobs(limit: int, url: str) -> None:
    """List the newest jobs.

    \b
    Example:
      lathe jobs list --limit 5
    """
    from service.job_view import table

    with connected(url) as client:
        found = client.get("/v1/jobs", limit=limit)["data"]
    rows = [["id", "type", "status", "attempt", "progress", "created"]]
    for job in found:
        progress = f"{job['progress']['step']}/{job['progress']['total']}"
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        rows.append([job["id"], job["type"], job["status"], str(job["attempt"]), progress, created])
    _echo(table(rows) if found else ["no jobs"])


@jobs.command("show")
@click.argument("job_id")
@url_option
def show_job(job_id: str, url: str) -> None:
    """Show a job as JSON, with its result or error.

    \b
    Example:
      lathe jobs show job-0123456789abcdef01234567
    """
    with connected(url) as client:
        _echo_json(client.get(f"/v1/jobs/{_segment(job_id)}"))


@jobs.command("watch")
@click.argument("job_id")
@url_option
def watch_job(job_id: str, url: str) -> None:
    """Follow a job until it ends. Exit code 1 unless it succeeded.

    \b
    Example:
      lathe jobs watch job-0123456789abcdef01234567
    """
    with connected(url) as client:
        _follow_to_the_end(client, _segment(job_id))


@jobs.command("logs")
@click.argument("job_id")
@url_option
def job_logs(job_id: str, url: str) -> None:
    """Print what the job's process wrote.

    \b
    Example:
      lathe jobs logs job-0123456789abcdef01234567
    """
    with connected(url) as client:
        click.echo(client.get_text(f"/v1/jobs/{_segment(job_id)}/logs"), nl=False)


@jobs.command("cancel")
@click.argument("job_id")
@url_option
def cancel_job(job_id: str, url: str) -> None:
    """Cancel a job; a running one ends within ten seconds.

    \b
    Example:
      lathe jobs cancel job-0123456789abcdef01234567
    """
    with connected(url) as client:
        job = client.post(f"/v1/jobs/{_segment(job_id)}/cancel")
    click.echo(f"{job['id']}: {job['status']}")


@jobs.command("pause")
@click.argument("job_id")
@url_option
def pause_job(job_id: str, url: str) -> None:
    """Pause a job; a running one keeps what it finished and frees the machine.

    \b
    Example:
      lathe jobs pause job-0123456789abcdef01234567
    """
    with connected(url) as client:
        job = client.post(f"/v1/jobs/{_segment(job_id)}/pause")
    click.echo(f"{job['id']}: {job['status']}")


@jobs.command("resume")
@click.argument("job_id")
@url_option
def resume_job(job_id: str, url: str) -> None:
    """Queue a paused job again; it goes on where it was.

    \b
    Example:
      lathe jobs resume job-0123456789abcdef01234567
    """
    with connected(url) as client:
        job = client.post(f"/v1/jobs/{_segment(job_id)}/resume")
    click.echo(f"{job['id']}: {job['status']}")


@jobs.command("artifacts")
@click.argument("job_id")
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), help="Download them here."
)
@click.option(
    "--delete",
    is_flag=True,
    help="Then delete all that the job keeps on disk: logs and checkpoints too.",
)
@url_option
def job_artifacts(job_id: str, save: Path | None, delete: bool, url: str) -> None:
    """List the files a job produced, download them, delete them.

    \b
    Examples:
      lathe jobs artifacts job-0123456789abcdef01234567 --save ./report
      lathe jobs artifacts job-0123456789abcdef01234567 --delete
    """
    from service.job_view import human_bytes, table

    path = f"/v1/jobs/{_segment(job_id)}/artifacts"
    with connected(url) as client:
        found = client.get(path)["data"]
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            for artifact in found:
                name = Path(artifact["name"]).name  # never out of the chosen folder
                (save / name).write_bytes(client.get_bytes(f"{path}/{_segment(artifact['name'])}"))
        if delete:
            client.delete(path)
    rows = [["name", "size", "sha256"]]
    rows += [[a["name"], human_bytes(a["bytes"]), a["sha256"]] for a in found]
    _echo(table(rows) if found else ["no artifacts"])


@click.command()
@click.option("-m", "--message", help="Ask this and leave; otherwise a conversation starts.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--system", help="System message.")
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@url_option
def chat(
    message: str | None,
    model: str,
    system: str | None,
    temperature: float,
    max_tokens: int,
    url: str,
) -> None:
    """Talk to a model; its answer is printed as it comes.

    \b
    Examples:
      lathe chat -m "Name three turning tools."
      lathe chat --model smollm2-135m-int4
    """
    messages = [{"role": "system", "content": system}] if system else []
    options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    with connected(url) as client:
        if message is not None:
            _say(client, [*messages, {"role": "user", "content": message}], options)
            return
        click.echo(f"Talking to {model}; an empty line or Ctrl-D ends it.", err=True)
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = _say(client, messages, options)
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()


def _say(client: "ApiClient", messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Stream one answer to the terminal; returns it."""
    answer = ""
    body = {**options, "messages": messages, "stream": True}
    for chunk in client.stream("/v1/chat/completions", body):
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            answer += piece
            click.echo(piece, nl=False)
            sys.stdout.flush()
    click.echo()
    return answer


def _follow_to_the_end(client: "ApiClient", job_id: str) -> None:
    from service.job_view import follow, report_lines
    from service.terminal import Terminal

    try:
        job = follow(client, job_id, Terminal())
    except KeyboardInterrupt:
        click.echo(f"the job goes on; end it with: lathe jobs cancel {job_id}", err=True)
        sys.exit(130)
    result = job.get("result") or {}
    if "report" in result:
        _echo(["", *report_lines(result["report"])])
    if job["status"] != "succeeded":
        error = job.get("error") or {}
        reason = error.get("message") or job.get("status_reason") or "no reason given"
        raise click.ClickException(f"{job_id} {job['status']}: {reason}")
    if result.get("model"):
        click.echo(
            f"\n{result['model']} is registered; serve it with: lathe models load {result['model']}"
        )


def _segment(identifier: str) -> str:
    """One path segment of a URL, whatever was typed."""
    from urllib.parse import quote

    return quote(identifier, safe="")


def _echo(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


def _echo_json(body: Any) -> None:
    import json

    click.echo(json.dumps(body, indent=2, ensure_ascii=False))


COMMANDS: tuple[click.Command, ...] = (
    models,
    compress,
    calibrate_skip,
    finetune,
    files,
    jobs,
    chat,
)
