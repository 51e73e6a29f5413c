from dataclasses import dataclass
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.position import Position
from rollforward.store.parts import assign
from rollforward.store.retention import Candidate, Retention, Verdict, keep_mask


@dataclass(frozen=True, kw_only=True)
class Looked(Candidate):
    """A checkpoint of which it is known whether it is valid."""

    valid: bool | None
    """None when nothing is known of it."""

    @property
    def verdict(self):
        return {True: Verdict.VALID, False: Verdict.INVALID, None: Verdict.UNKNOWN}[self.valid]


def candidate(step, *, incarnation=1, valid=True, metric=None):
    return Looked(
        incarnation=incarnation, position=Position(0, step), global_step=step, metric=metric, valid=valid
    )


def kept(candidates, *, asked=None, **policy):
    def valid(item):
        if asked is not None:
            asked.add(item.position.step)
        return item.verdict

    mask = keep_mask(candidates, Retention(**policy), valid)
    return [item.position.step for item, keep in zip(candidates, mask, strict=True) if keep]


def test_the_newest_stay_whatever_the_order_they_are_listed_in():
    assert kept([candidate(step) for step in (30, 10, 50, 20, 40)], newest=2) == [50, 40]


def test_zero_keeps_everything():
    assert kept([candidate(step) for step in range(9)], newest=0) == list(range(9))


def test_every_nth_and_the_best_stay_besides():
    found = [candidate(step, metric=-abs(step - 7)) for step in range(1, 21)]
    assert kept(found, newest=1, every=10, best=2) == [7, 8, 10, 20]


def test_only_those_are_looked_at_on_which_something_depends():
    found = [candidate(step, metric=-abs(step - 57)) for step in range(1, 101)]
    asked = set()
    assert kept(found, asked=asked, newest=2, every=50, best=1) == [50, 57, 99, 100]
    assert asked == {50, 57, 99, 100}
    asked.clear()
    assert kept(found, asked=asked, newest=100) == list(range(1, 101))
    assert asked == set()


def test_an_invalid_one_takes_no_place_and_stays_only_while_it_is_newer():
    found = [candidate(10, valid=False), candidate(20), candidate(30, valid=False), candidate(40)]
    assert kept(found, newest=2) == [20, 30, 40]
    assert kept(found, newest=1) == [40]


def test_a_corrupt_newer_one_never_costs_the_last_valid_one():
    assert kept([candidate(10), candidate(20, valid=False)], newest=1) == [10, 20]


def test_nothing_valid_means_nothing_goes():
    assert kept([candidate(10, valid=False), candidate(20, valid=False)], newest=1) == [10, 20]


def test_a_later_start_that_went_back_is_newer():
    assert kept([candidate(40), candidate(25, incarnation=2)], newest=1) == [25]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30), st.booleans()), unique_by=lambda item: item[1]),
    st.integers(0, 4),
    st.integers(0, 7),
    st.integers(0, 3),
)
def test_the_newest_valid_one_always_stays(items, newest, every, best):
    found = [
        candidate(step, incarnation=number, valid=valid, metric=step % 5) for number, step, valid in items
    ]
    mask = keep_mask(found, Retention(newest=newest, every=every, best=best), lambda item: item.verdict)
    valid = [(item.incarnation, item.position) for item in found if item.valid]
    if valid:
        index = next(i for i, item in enumerate(found) if (item.incarnation, item.position) == max(valid))
        assert mask[index]


def test_shares_cover_every_tensor_once_and_stay_balanced():
    sizes = {
        "policy_model": {f"p{i}": (i * 7919) % 1000 for i in range(300)},
        "ref": {"one": 10},
        "optimizer": {},
    }
    for world_size in (1, 2, 7):
        shares = assign(sizes, world_size)
        for role, names in shares.items():
            assert sorted(name for part in names for name in part) == sorted(sizes[role])
        loads = [sum(sizes["policy_model"][name] for name in part) for part in shares["policy_model"]]
        assert max(loads) - min(loads) <= 1000
    assert assign(sizes, 3) == assign(
        {role: dict(reversed(named.items())) for role, named in sizes.items()}, 3
    )


def test_roles_of_one_tensor_are_spread_over_ranks():
    shares = assign({"policy_model": {"a": 5}, "optimizer": {"b": 5}, "ref": {"c": 5}}, 3)
    assert sorted(rank for role, rank in product(shares, range(3)) if shares[role][rank]) == [0, 1, 2]
