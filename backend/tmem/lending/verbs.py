"""The verbs of tmemctl, answered by the lender; who may use them and who sees whom."""

from __future__ import annotations

from tmem.lending.actions import Action
from tmem.lending.lender import Lender
from tmem.lending.messages import Answer, Verb


def answer(lender: Lender, now: float, verb: Verb, uid: int, trusted: bool) -> tuple[list[Answer], list[Action]]:
    """Carry out a verb of a person with that uid; `trusted` says that it is root or tmemd's own user.

    Others see their own guests alone and change nothing.
    """
    raise NotImplementedError
