"""Run tmemd with the policy `greedy` besides its own.

python -m bench.subjects.greedytmemd --policy greedy …
"""

from __future__ import annotations

from bench.models.reclaimpolicies import Greedy
from tmem.lending.lender.reclaimpolicy import RECLAIM_POLICIES

if __name__ == "__main__":
    RECLAIM_POLICIES[Greedy.name] = Greedy  # before tmemd is imported: it builds its --policy from them
    from tmem.lending.daemon.tmemd import main

    main()
