"""Whether what a job will hold fits: the ledger's prediction against what the machine has."""

from pathlib import Path

from training.ledger import MemoryLedger


def too_large(ledger: MemoryLedger, available: int, where: str) -> str | None:
    """Why it does not fit, with the arithmetic; None where it does."""
    if ledger.peak <= available:
        return None
    parts = ledger.to_json()
    peak = parts.pop("peak")
    shown = " + ".join(f"{_gib(size)} {name}" for name, size in parts.items() if size)
    return (
        f"the job would hold {_gib(peak)} GiB at its peak ({shown}), {where} {_gib(available)} GiB:"
        " a shorter max_length, a smaller batch_size, gradient_checkpointing or another method needs less"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def has_nvidia_gpu() -> bool:
    """The device itself: in a container the driver's other files may be there without it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
