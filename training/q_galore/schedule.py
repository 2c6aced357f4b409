"""When a matrix' subspace is found anew: lazily, matrix by matrix, and not all in one step (Q-GaLore, Zhang et al.
2024, arXiv:2407.08296). Imports no torch.

All matrices need a basis at the first step. Their second refreshes are spread over an interval, so that no later step
has to do all of them.
"""

from dataclasses import dataclass, field

HISTORY = 5
THRESHOLD = 0.4
FACTOR = 2


@dataclass(slots=True, kw_only=True)
class RefreshSchedule:
    """One matrix' schedule.

    Attributes:
        interval: steps between refreshes; doubled, when lazy, while the mean of the last five similarities is 0.4 or
            more.
        phase: part of an interval, in [0, 1), by which the second refresh is late.
        due_at: step of the next refresh.
    """

    interval: int
    lazy: bool
    phase: float = 0.0
    due_at: int = 0
    num_refreshes: int = 0
    similarities: list[float] = field(default_factory=list)

    def is_due(self, step: int) -> bool:
        return step >= self.due_at

    def refreshed(self, step: int, similarity: float | None) -> None:
        """Note a refresh. `similarity` of the basis before and the one found; None at the first."""
        first = self.num_refreshes == 0
        self.num_refreshes += 1
        if similarity is not None:
            self.similarities = [*self.similarities, similarity][-HISTORY:]
            full = len(self.similarities) == HISTORY
            if self.lazy and full and sum(self.similarities) / HISTORY >= THRESHOLD:
                self.interval *= FACTOR
        self.due_at = step + self.interval + (int(self.phase * self.interval) if first else 0)


def fixed_refreshes(num_steps: int, interval: int) -> int:
    """Refreshes of one matrix in a run without laziness or phase."""
    return -(-num_steps // interval)
