"""One GPU for serving and for jobs: engines sleep while a job trains, or the job is refused.

Which engines were put to sleep is written down before they are, so that a worker that comes after one that died wakes
them. For the one worker of a machine.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, get_args

from engines.client import EngineClient
from engines.protocol import EngineError

GpuPolicy = Literal["sleep", "busy", "share"]
"""`sleep`: engines free the GPU until the job has ended. `busy`: the job fails. `share`: both try to fit."""
GPU_POLICIES: tuple[GpuPolicy, ...] = get_args(GpuPolicy)
ASLEEP_NAME = "asleep.json"
SECONDS = 30.0
"""For one engine to free its memory, or to load its weights again."""

logger = logging.getLogger("lathe.worker")


class GpuBusyError(Exception):
    """Engines are on the GPU, and the policy is not to disturb them."""


def take_gpu(run_dir: Path, policy: GpuPolicy) -> None:
    """Make room on the GPU for a job.

    Raises:
        GpuBusyError: the policy is "busy" and an engine is on it; or one cannot be put to sleep.
    """
    if policy == "share":
        return
    awake = asyncio.run(_each(_sockets(run_dir), _awake_on_gpu))
    if not awake:
        return
    if policy == "busy":
        raise GpuBusyError(
            f"the GPU serves {', '.join(awake)}; unload or put to sleep what is not needed, or set"
            " LATHE_JOB_GPU_POLICY=sleep"
        )
    temporary = run_dir / f".{ASLEEP_NAME}.tmp"
    temporary.write_text(json.dumps(awake))
    temporary.replace(run_dir / ASLEEP_NAME)
    logger.info("putting to sleep for a job: %s", ", ".join(awake))
    slept = asyncio.run(_each(_sockets(run_dir, awake), _sleep))
    if set(slept) != set(awake):
        give_gpu_back(run_dir)
        stubborn = ", ".join(sorted(set(awake) - set(slept)))
        raise GpuBusyError(f"{stubborn} could not be put to sleep")


def give_gpu_back(run_dir: Path) -> None:
    """Wake what was put to sleep for a job, by this worker or by one before it."""
    path = run_dir / ASLEEP_NAME
    if not path.is_file():
        return
    asleep: list[str] = json.loads(path.read_text())
    woken = asyncio.run(_each(_sockets(run_dir, asleep), _wake))
    logger.info("woken after a job: %s", ", ".join(woken) or "none")
    path.unlink()


async def _awake_on_gpu(engine: EngineClient) -> bool:
    return engine.info.device.startswith("cuda") and not (await engine.stats()).sleeping


async def _sleep(engine: EngineClient) -> bool:
    await engine.sleep()
    return True


async def _wake(engine: EngineClient) -> bool:
    await engine.wake()
    return True


def _sockets(run_dir: Path, models: list[str] | None = None) -> list[Path]:
    """Of the engines, or of some of them."""
    paths = (path for path in sorted(run_dir.glob("*.sock")) if path.stem != "supervisor")
    return [path for path in paths if models is None or path.stem in models]


async def _each(sockets: list[Path], ask: Callable[[EngineClient], Awaitable[bool]]) -> list[str]:
    """Models of the engines that answered yes; one that ended meanwhile holds no memory, and is left out."""
    found = []
    for path in sockets:
        try:
            async with asyncio.timeout(SECONDS):
                client = await EngineClient.connect(path)
                try:
                    if await ask(client):
                        found.append(path.stem)
                finally:
                    await client.aclose()
        except (EngineError, TimeoutError) as error:
            logger.warning("%s: %s", path.stem, error)
    return found
