"""The limits of one request while it is worked on."""

import asyncio

from graph.enrich_types import BudgetName, EnrichBudget


class BudgetLedger:
    """The budget of one request: what is spent, what is reserved, and what stopped it."""

    def __init__(self, budget: EnrichBudget) -> None:
        self._max_tokens, self._token_budget = budget.token_limit()
        self._spent = 0
        self._reserved = 0
        self._changed = asyncio.Event()
        # First come, first served: the nodes that are skipped are the last.
        self._turn = asyncio.Lock()
        self.stopped_by: BudgetName | None = None
        self.exhausted = False
        now = asyncio.get_running_loop().time()
        self.deadline = None if budget.seconds is None else now + budget.seconds

    async def reserve(self, tokens: int) -> bool:
        """Set tokens aside; while others may give some back, wait for them. False: the budget is exhausted."""
        if self._max_tokens is None:
            return True
        async with self._turn:
            while not self.exhausted and self._spent + self._reserved + tokens > self._max_tokens:
                if self._reserved == 0:
                    self.stop(self._token_budget)
                else:
                    await self._changed.wait()
            if not self.exhausted:
                self._reserved += tokens
            return not self.exhausted

    def settle(self, reserved: int, used: int) -> None:
        """Give back what was set aside, and count what was used of it."""
        if self._max_tokens is not None:
            self._reserved -= reserved
            self._spent += used
            self._wake()

    def stop(self, name: BudgetName) -> None:
        self.exhausted = True
        self.stopped_by = self.stopped_by or name
        self._wake()

    def _wake(self) -> None:
        """Let everyone who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()
