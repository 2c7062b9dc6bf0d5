"""tmemd's command line, with a broker that checks the ledger after each event.

A failed check ends tmemd with a traceback, which the tests look for.
"""

from __future__ import annotations

from collections.abc import Iterable

import tmem.lending.daemon.tmemd
from tmem.lending.daemon.broker import Broker
from tmem.lending.lender.actions import Action


class CheckedBroker(Broker):
    """A broker that checks the ledger after each message."""

    def _perform(self, actions: Iterable[Action]) -> None:
        super()._perform(actions)
        self.check()


if __name__ == "__main__":
    vars(tmem.lending.daemon.tmemd)["Broker"] = CheckedBroker
    tmem.lending.daemon.tmemd.main()
