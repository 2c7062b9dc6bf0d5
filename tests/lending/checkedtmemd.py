"""The command line of tmemd with a broker that checks its ledger after everything that happens.

What it finds ends tmemd with a traceback, which the tests look for.
"""

from __future__ import annotations

from collections.abc import Iterable

import tmem.lending.tmemd
from tmem.lending.actions import Action
from tmem.lending.broker import Broker


class CheckedBroker(Broker):
    """A broker whose ledger must be right between any two messages."""

    def _perform(self, actions: Iterable[Action]) -> None:
        super()._perform(actions)
        self.check()


if __name__ == "__main__":
    vars(tmem.lending.tmemd)["Broker"] = CheckedBroker
    tmem.lending.tmemd.main()
