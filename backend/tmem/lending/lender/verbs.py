"""Carries out the verbs of tmemctl and checks who may use them."""

from __future__ import annotations

from tmem.arena import SLAB_SIZE
from tmem.lending.lender.actions import Action, Refusal
from tmem.lending.lender.ledger import as_bytes
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.stats import Why
from tmem.lending.protocol.messages import (
    MAX_ROWS,
    Answer,
    AskTotals,
    Done,
    Drain,
    Evict,
    Failed,
    Freeze,
    List,
    Resize,
    Row,
    SetLimits,
    Table,
    TakeBack,
    Thaw,
    Totals,
    Verb,
)

_SIZES = ("size", "free", "ephemeral", "persistent", "promised", "unpunched", "pinned", "reserved")


def answer(lender: Lender, now: float, verb: Verb, uid: int, trusted: bool) -> tuple[list[Answer], list[Action]]:
    """Carry out a verb for a uid; `trusted` is set for root and tmemd's own user.

    Others see only their own guests and change nothing.
    """
    if isinstance(verb, List):
        return list(_tables(lender.rows(now, None if trusted else uid))), []
    if isinstance(verb, AskTotals):
        return [_totals(lender)], []
    try:
        if not trusted:
            raise Refusal("only root and the user that runs tmemd may change anything", Why.TRUST)
        text, actions = _change(lender, now, verb)
    except Refusal as refusal:
        return [Failed(str(refusal))], []
    return [Done(text)], actions


def _tables(rows: list[Row]) -> list[Table]:
    starts = range(0, max(1, len(rows)), MAX_ROWS)
    return [Table(tuple(rows[start : start + MAX_ROWS]), start + MAX_ROWS >= len(rows)) for start in starts]


def _totals(lender: Lender) -> Totals:
    stats = lender.stats()
    memory = {f"{name}_bytes": getattr(stats, name) * SLAB_SIZE for name in _SIZES}
    others = {"guests": stats.guests, "connected": stats.connected, "map_bytes": stats.map_bytes}
    return Totals(memory | others | stats.counters)


def _change(lender: Lender, now: float, verb: Verb) -> tuple[str, list[Action]]:
    match verb:
        case SetLimits(guest, weight, cap, floor, persistent_cap):
            number = lender.find(guest)
            return "", lender.set_limits(
                now, number, weight=weight, cap=cap, floor=floor, persistent_cap=persistent_cap
            )
        case Freeze(guest):
            return "", lender.freeze(now, lender.find(guest) if guest else None)
        case Thaw(guest):
            return "", lender.thaw(now, lender.find(guest) if guest else None)
        case TakeBack(guest, slabs):
            return "", lender.revoke(now, lender.find(guest), slabs, verb.kind)
        case Drain(guest):
            return "", lender.drain(now, lender.find(guest))
        case Evict(guest, lose_persistent):
            number = lender.find(guest)
            holding = lender.holding(number)
            held = as_bytes(holding.ephemeral + holding.persistent)
            return f"{held} are free again", lender.evict(now, number, lose_persistent)
        case Resize(slabs):
            size, actions = lender.resize(now, slabs)
            if size == slabs:
                return f"the size is {as_bytes(size)}", actions
            kept = f"the size is {as_bytes(size)}, not {as_bytes(slabs)}: persistent memory and floors hold that much"
            return f"{kept}; evict frees a guest's", actions
        case _:
            raise TypeError(f"{type(verb).__name__} is not a verb that changes anything")
