"""Records which guest holds how many slabs, and what each guest was promised.

Rules, in slabs:

1. Held slabs, slabs being populated, and slabs not punched yet never exceed the size. If they do, because the size was
   made smaller or tmemd restarted with a smaller one, nothing is lent until enough came back.
2. Floors and persistent caps of all guests together never exceed the size. So a guest below its floor or persistent cap
   can always get memory: it is free, or some guest holds ephemeral slabs above its floor.
3. A guest holds at most its cap. The guests of one uid other than 0 hold, and are promised, at most the uid's cap.
4. A floor is at most the cap. A persistent cap that nobody requested is at most half of the arena. These default caps
   share evenly what is left of the size, on top of what each guest holds. They shrink and grow with it.
5. Floors and persistent slabs can never be taken, so they are bounded by user: UserBounds.persistent, or half of the
   size, for one user, and three quarters of the size for all. Trusted users and verbs of the administrator are exempt.
6. The size is the requested one, but not below what rule 2 and held persistent slabs need. After a restart it may be
   larger until the guests claimed what they hold.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tmem.arena import SLAB_SIZE
from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Holding, Refusal
from tmem.lending.lender.settings import GuestSettings
from tmem.lending.lender.slabmap import SlabMap, State
from tmem.lending.lender.stats import Why
from tmem.lending.lender.unpunched import Unpunched
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import MAX_SLABS, VERSION, Hello
from tmem.lending.protocol.runs import Run
from tmemcommon.sizes import format_exact_size

MAX_GUESTS = 4096
RESERVED_GUESTS = 256  # of them, for trusted users
# Bounds tmemd's memory for one user's guests: a byte a slab, two while they claim.
MAX_GUESTS_OF_A_UID = 512
MAX_ARENAS_OF_A_UID = MAX_SLABS

# Shares of the size that may be promised to one user, and to all untrusted users.
USER_SHARE = 1 / 2
ALL_USERS_SHARE = 3 / 4

_BOOKED = (State.EPHEMERAL, State.PERSISTENT, State.POPULATING_EPHEMERAL, State.POPULATING_PERSISTENT)


def as_bytes(slabs: int) -> str:
    """Format a number of slabs as an exact size: 64K, 1536M."""
    return format_exact_size(slabs * SLAB_SIZE)


@dataclass(frozen=True, slots=True)
class UserBounds:
    """Bounds for the guests of one user together, in slabs; the default has none."""

    cap: int | None = None  # of held and of promised slabs; not for root
    persistent: int | None = None  # of promised slabs; None for USER_SHARE of the size
    trusted: frozenset[int] | None = None  # users without bounds on promises; None for all users


UNBOUNDED = UserBounds()


class Ledger:
    """Accounts, their sums, and the rules above."""

    def __init__(self, size: int, bounds: UserBounds) -> None:
        self.size = self._wanted = size
        self._bounds = bounds
        self.accounts: dict[int, Account] = {}
        self.totals = [0] * len(State)  # slabs of all guests by state
        self.held_by: Counter[int] = Counter()  # slabs held or promised by uid
        self.unpunched = Unpunched()
        self._numbers = 0

    # Sums.

    @property
    def booked(self) -> int:
        """Slabs that are held, being populated, or not punched yet."""
        return sum(self.totals[state] for state in _BOOKED) + self.unpunched.total

    @property
    def free(self) -> int:
        """Slabs that may be lent now."""
        return max(0, self.size - self.booked)

    @property
    def reserved(self) -> int:
        """Floors and persistent caps of all guests."""
        return sum(account.reserved for account in self.accounts.values())

    def move(self, account: Account, runs: Sequence[Run], state: State) -> None:
        """Put slabs of a guest into a state."""
        with self._changing(account):
            account.map.set(runs, state)

    def replace(self, account: Account, was: State, state: State) -> None:
        """Put all of a guest's slabs in one state into another."""
        with self._changing(account):
            account.map.replace(was, state)

    def load(self, account: Account, states: bytearray) -> None:
        """Replace the states of all of a guest's slabs."""
        with self._changing(account):
            account.map.load(states)

    @contextlib.contextmanager
    def _changing(self, account: Account) -> Iterator[None]:
        """Keep the sums right while a guest's map changes."""
        before, held = account.map.counts.copy(), account.held
        yield
        self.held_by[account.uid] += account.held - held
        for each in State:
            self.totals[each] += account.map.counts[each] - before[each]
        account.activity.slabs = account.ephemeral

    def release(self, account: Account, runs: Sequence[Run], state: State) -> int:
        """Put slabs into a state in which the guest does not hold them; return how many stay booked until punched."""
        before = account.held
        self.move(account, runs, state)
        self.unpunched.add(account, before - account.held)
        return before - account.held

    def room(self, account: Account, kind: Kind) -> int:
        """Return how many more slabs the limits allow, free or not."""
        room = account.settings.cap - account.held
        if kind is Kind.PERSISTENT:
            room = min(room, account.persistent_cap - account.persistent)
        if self._bounds.cap is not None and account.uid != 0:
            room = min(room, self._bounds.cap - self.held_by[account.uid] - self.unpunched.held_by[account.uid])
        return max(0, room)

    def _accounts_of(self, uid: int) -> list[Account]:
        return [account for account in self.accounts.values() if account.uid == uid]

    # Joining and leaving.

    def admit(self, hello: Hello, uid: int, pid: int) -> tuple[Account, list[Account]]:
        """Open an account; return it and the accounts whose persistent cap changed. Refusal when it does not fit."""
        if hello.version != VERSION:
            raise Refusal(
                f"this tmemd speaks version {VERSION}, the guest {hello.version}: upgrade the older one", Why.VERSION
            )
        if self._is_full(uid, hello.slabs):
            raise Refusal("tmemd has as many guests as it may: unmount one first", Why.GUESTS, retry=True)
        wanted = hello.persistent_slabs
        most = min(wanted or 0, hello.slabs)
        promisable = min(self._promisable(uid), self._user_quota_left(uid, self._committed_by_uid()))
        if most > promisable:
            raise Refusal(
                f"{as_bytes(most)} of persistent memory cannot be promised, only {as_bytes(promisable)}: "
                "take a smaller --hswap, or give tmemd or this user more (tmemctl resize, tmemd --uid-persistent)",
                Why.PROMISE,
                retry=True,
            )
        promised = None if wanted is None else most
        settings = GuestSettings(cap=hello.slabs, persistent_cap=promised)
        account = self._open(Holding(hello.token, hello.name, uid, pid, hello.slabs, 0, 0, settings))
        return account, [other for other in self._distribute_persistent() if other is not account]

    def _is_full(self, uid: int, slabs: int) -> bool:
        """Return whether a user may have no more guests."""
        if uid in (self._bounds.trusted or (0,)):
            return len(self.accounts) >= MAX_GUESTS
        peers = self._accounts_of(uid)
        arenas = sum(peer.map.total for peer in peers) + slabs
        full = len(self.accounts) >= MAX_GUESTS - RESERVED_GUESTS or len(peers) >= MAX_GUESTS_OF_A_UID
        return full or arenas > MAX_ARENAS_OF_A_UID

    def _open(self, holding: Holding) -> Account:
        self._numbers += 1
        slabs = holding.slabs
        account = Account(
            self._numbers,
            holding.token,
            holding.name,
            holding.uid,
            holding.pid,
            SlabMap(slabs),
            holding.settings,
        )
        account.activity.weight, account.activity.uid = holding.settings.weight, holding.uid
        self.accounts[account.number] = account
        self.totals[State.FREE] += slabs
        return account

    def restore(self, holdings: Sequence[Holding]) -> None:
        """Open the accounts of an earlier tmemd; lower promises that no longer fit."""
        for holding in holdings:
            account = self._open(holding)
            if holding.settings.evicted:
                account.change(floor=0, persistent_cap=0)
                # Its arena will not be punched: an evicted guest does not bring its memfd again.
                self.unpunched.set_hanging(account, True)
                self.unpunched.add(account, holding.ephemeral + holding.persistent)
                continue
            account.slabs_unknown = account.known_at_start = True
            # Which slabs it holds is unknown until it claims them: book any.
            self.move(account, ((0, holding.ephemeral),), State.EPHEMERAL)
            self.move(account, ((holding.ephemeral, holding.persistent),), State.PERSISTENT)
        accounts = self.accounts.values()
        requested = [account for account in accounts if account.settings.persistent_cap is not None]
        for account in sorted(requested, key=lambda account: account.persistent - account.persistent_cap):
            if (over := self.committed() - self.size) > 0:
                account.change(persistent_cap=max(account.persistent, account.persistent_cap - over))
        for account in accounts:
            if (over := self.committed() - self.size) > 0:
                account.change(floor=max(0, account.settings.floor - over))
        self.size = max(self.size, self.committed())
        self._distribute_persistent()

    def clear(self, account: Account) -> list[Account]:
        """Remove all slabs and promises of a guest; return the accounts whose limits changed."""
        self.unpunched.closed(account)
        self.load(account, bytearray())
        account.change(floor=0, persistent_cap=0)
        account.slabs_unknown = False
        return self._distribute_persistent()

    def close(self, account: Account) -> list[Account]:
        """Remove a guest, whose slabs are free; return the accounts whose limits changed."""
        self.unpunched.closed(account)
        for state in State:
            self.totals[state] -= account.map.counts[state]
        self.held_by[account.uid] -= account.held
        del self.accounts[account.number]
        return self._distribute_persistent()

    # Promises.

    def committed(self, but: Account | None = None, uid: int | None = None) -> int:
        """Return the committed slabs of one uid, or of all, without one account."""
        accounts = (account for account in self.accounts.values() if uid in (None, account.uid))
        return sum(account.committed for account in accounts if account is not but)

    def _promisable(self, uid: int, but: Account | None = None) -> int:
        """Return how many slabs a verb may promise to a guest of that uid."""
        room = self.size - self.committed(but)
        if self._bounds.cap is not None and uid != 0:
            room = min(room, self._bounds.cap - self.committed(but, uid))
        return max(0, room)

    def _committed_by_uid(self) -> Counter[int]:
        committed: Counter[int] = Counter()
        for account in self.accounts.values():
            committed[account.uid] += account.committed
        return committed

    def _user_quota_left(self, uid: int, promised: Counter[int]) -> int:
        """Return how many more slabs rule 5 allows to promise to a uid, given the promises by uid."""
        trusted = self._bounds.trusted
        if trusted is None or uid in trusted:
            return self.size
        a_users = self._bounds.persistent
        if a_users is None:
            a_users = int(self.size * USER_SHARE)
        all_users = max(a_users, int(self.size * ALL_USERS_SHARE))
        others = sum(slabs for other, slabs in promised.items() if other not in trusted)
        return max(0, min(a_users - promised[uid], all_users - others))

    def _distribute_persistent(self) -> list[Account]:
        """Divide what is not committed among the default persistent caps; return the accounts that changed.

        Each gets what it holds and an even part of the rest, up to half of its arena.
        """
        unrequested = [account for account in self.accounts.values() if account.settings.persistent_cap is None]
        unrequested.sort(key=lambda account: account.map.total // 2 - account.persistent)
        left = self.size - self.committed()
        peers = Counter(account.uid for account in unrequested)
        rooms = {uid: self._promisable(uid) for uid in peers}
        promised = self._committed_by_uid()
        changed = []
        for place, account in enumerate(unrequested):
            uid, wanted = account.uid, account.map.total // 2 - account.persistent
            room = min(rooms[uid], self._user_quota_left(uid, promised)) // peers[uid]
            part = max(0, min(wanted, left // (len(unrequested) - place), room))
            left -= part
            rooms[uid] -= part
            promised[uid] += part
            peers[uid] -= 1
            if account.persistent_cap != account.persistent + part:
                account.persistent_share = account.persistent + part
                changed.append(account)
        return changed

    def set_limits(
        self, account: Account, weight: float | None, cap: int | None, floor: int | None, persistent_cap: int | None
    ) -> list[Account]:
        """Change limits; return the accounts whose limits changed. Refusal changes nothing."""
        total = account.map.total
        old = account.settings
        new_cap = old.cap if cap is None else cap
        new_floor = old.floor if floor is None else floor
        promised = account.persistent_cap if persistent_cap is None else persistent_cap
        for name, value in (("cap", new_cap), ("floor", new_floor), ("persistent cap", promised)):
            if value > total:
                raise Refusal(f"a {name} of {as_bytes(value)} exceeds the arena of {as_bytes(total)}", Why.LIMITS)
        if cap == 0:
            raise Refusal("a cap of 0 would lend nothing: tmemctl drain does that, tmemctl thaw ends it", Why.LIMITS)
        if new_cap < new_floor:
            raise Refusal(
                f"a cap of {as_bytes(new_cap)} is below the floor of {as_bytes(new_floor)}: lower the floor too",
                Why.LIMITS,
            )
        committed = old.persistent_cap is not None or persistent_cap is not None
        wanted = new_floor + (max(promised, account.persistent) if committed else account.persistent)
        promisable = self._promisable(account.uid, account)
        if wanted > max(promisable, account.committed):
            raise Refusal(
                f"floor and persistent cap would need {as_bytes(wanted)}, and {as_bytes(promisable)} can be promised: "
                "lower those of others, or resize",
                Why.PROMISE,
            )
        account.change(
            cap=new_cap,
            weight=old.weight if weight is None else weight,
            floor=new_floor,
            persistent_cap=promised if committed else None,
        )
        return [account, *(other for other in self._distribute_persistent() if other is not account)]

    def resize(self, size: int) -> None:
        """Change the size, within rule 6; limits of any account may change."""
        self._wanted = size
        self.size = max(size, self.committed())
        self._distribute_persistent()

    def shrink(self) -> bool:
        """Lower the size towards the requested one, within rule 6; return whether it changed."""
        if self.size <= self._wanted or (size := max(self._wanted, self.committed())) >= self.size:
            return False
        self.size = size
        self._distribute_persistent()
        return True

    def check(self) -> None:
        """Raise AssertionError unless the sums are those of the accounts and the promises fit."""
        for account in self.accounts.values():
            account.check()
        for state in State:
            total = sum(account.map.counts[state] for account in self.accounts.values())
            assert self.totals[state] == total, f"sum of {state.name}"
        for uid, held in self.held_by.items():
            assert held == sum(account.held for account in self._accounts_of(uid)), f"sum of uid {uid}"
        self.unpunched.check(self.accounts.values())
        assert self.reserved <= self.size, "more is promised than there is"
