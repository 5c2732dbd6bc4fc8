"""How units are cut into batches, what a budget is divided into, and which shards a store keeps."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lr.checkpoint.hub import RemoteFile
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.store import ShardStore
from mergekit_lr.engine.batches import Needs, live_bytes, make_batches
from mergekit_lr.engine.units import Unit
from mergekit_lr.errors import ResourceError


class Table(Needs):
    """What units read and write, given as lists."""

    def __init__(self, reads: list[set[int]], writes: list[set[int]]) -> None:
        self._reads, self._writes = reads, writes

    def inputs(self, unit: Unit) -> frozenset[Path]:
        return frozenset(Path(str(i)) for i in self._reads[unit.sink])

    def outputs(self, unit: Unit) -> frozenset[int]:
        return frozenset(self._writes[unit.sink])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[set[int]], list[set[int]], dict[Path, int], int]:
    n = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 9), min_size=6, max_size=6))
    some = st.sets(st.integers(0, 5), max_size=3)
    reads = [draw(some) for _ in range(n)]
    writes = [draw(st.sets(st.integers(0, 3), min_size=1, max_size=2)) for _ in range(n)]
    least = max(sum(sizes[i] for i in r) for r in reads)
    return reads, writes, {Path(str(i)): s for i, s in enumerate(sizes)}, least + draw(st.integers(0, 12))


@given(cases(), st.booleans())
def test_batches_keep_the_order_and_the_budget(case: Any, by_shard: bool) -> None:
    reads, writes, size, room = case
    units = [Unit(i, 0, 1) for i in range(len(reads))]
    needs = Table(reads, writes)
    batches = make_batches(units, needs, size, room, by_shard=by_shard)
    assert [u for b in batches for u in b.units] == units
    for b in batches:
        assert b.needs == frozenset().union(*(needs.inputs(u) for u in b.units))
        assert b.shards == frozenset().union(*(needs.outputs(u) for u in b.units))
        assert sum(size[p] for p in b.needs) <= room
    if not by_shard:
        # None could have taken the first unit of the next one.
        for b, after in itertools.pairwise(batches):
            assert sum(size[p] for p in b.needs | needs.inputs(after.units[0])) > room


def test_output_files_are_live_from_their_first_unit_to_their_last() -> None:
    needs = Table([set()] * 4, [{0}, {0, 1}, {1}, {2}])
    assert live_bytes([Unit(i, 0, 1) for i in range(4)], needs.outputs, [10, 20, 5]) == 30


class Fetching(ShardStore):
    """A store whose Hub is always there, and that keeps count."""

    def _fetch(self, path: Path, tell: Any) -> None:
        assert self.room is None or self.used + self.size(path) <= self.room
        self.fetched += self.size(path)
        self._there[path] = self._clock


def store(room: int | None, sizes: list[int]) -> Fetching:
    made = Fetching(Path("nowhere"), room)
    for i, size in enumerate(sizes):
        made.files[Path(str(i))] = Place("org/x"), RemoteFile(str(i), size)
    return made


def paths(*numbers: int) -> frozenset[Path]:
    return frozenset(Path(str(n)) for n in numbers)


@given(st.lists(st.sets(st.integers(0, 5), max_size=3), min_size=1, max_size=8), st.integers(0, 10))
def test_settling_never_passes_the_room(wanted: list[set[int]], spare: int) -> None:
    sizes = [3, 1, 4, 1, 5, 9]
    most = max(sum(sizes[i] for i in w) for w in wanted)
    made = store(most + spare, sizes)
    needs = [paths(*w) for w in wanted]
    for i, need in enumerate(needs):
        made.settle(need, needs[i + 1 :])
        assert need <= made._there.keys() and made.used <= most + spare
        made.fetch_ahead(needs[i + 1] if i + 1 < len(needs) else (), lambda _: None)
        assert made.used <= most + spare
    made.settle(())
    assert made.used == 0


def test_what_is_needed_again_soon_stays_if_there_is_room() -> None:
    made = store(5, [2, 2, 2, 2])
    needs = [paths(0, 1), paths(2), paths(0, 3), paths(1)]
    for i, need in enumerate(needs):
        made.settle(need, needs[i + 1 :])
    assert made.fetched == 2 * 5  # 0 stayed all along, 1 had to go while 2 and 3 came
    assert store(None, [2]).room is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ResourceError, match="disk budget is too small"):
        store(3, [2, 2]).settle(paths(0, 1))


def test_a_lazy_store_lets_the_oldest_go_and_nothing_that_is_read() -> None:
    made = store(4, [2, 2, 2])
    made._readers.append(SimpleNamespace(let_go=lambda path: None))  # type: ignore[arg-type]
    with made.held(Path("0")):
        with made.held(Path("1")):
            pass
        with made.held(Path("2")):  # 1 goes, 0 is being read
            assert set(made._there) == paths(0, 2)
    with made.held(Path("1")):
        assert set(made._there) == paths(1, 2)


def test_a_workspace_that_was_begun_anew_has_nothing(tmp_path: Path) -> None:
    made = store(4, [2])
    made.folder = tmp_path
    made.settle(paths(0))  # Path("0") is no file
    made.find()
    assert made.used == 0


def test_what_is_nobodys_is_removed(tmp_path: Path) -> None:
    made = ShardStore(tmp_path, 10)
    for name, data in (("mine", b"12"), ("short", b"1"), ("stray", b"123"), ("begun.incomplete", b"1")):
        (tmp_path / name).write_bytes(data)
    for name in ("mine", "short", "begun"):
        made.files[tmp_path / name] = Place("org/x"), RemoteFile(name, 2)
    made.find()
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "begun.incomplete"} and made.used == 2


def test_a_thread_waits_for_a_place_until_another_has_read() -> None:
    made = store(4, [2, 2, 2])
    made._readers.append(SimpleNamespace(let_go=lambda path: None))  # type: ignore[arg-type]
    seen: list[set[Path]] = []

    def read() -> None:
        with made.held(Path("2")):
            seen.append(set(made._there))

    with made.held(Path("1")):
        with made.held(Path("0")):
            waiting = threading.Thread(target=read)
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive() and seen == []  # 0 and 1 are being read, and there is no third place
        waiting.join(10)
    assert seen == [paths(1, 2)] and made.fetched == 6


def test_what_another_fetched_meanwhile_is_not_fetched_again() -> None:
    """Two threads want the same shard while there is no place for it."""
    made = store(4, [2, 2, 2])
    made._readers.append(SimpleNamespace(let_go=lambda path: None))  # type: ignore[arg-type]
    done: list[int] = []

    def read() -> None:
        with made.held(Path("2")):
            done.append(made.fetched)

    threads = [threading.Thread(target=read) for _ in range(2)]
    with made.held(Path("0")), made.held(Path("1")):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.1)
        assert done == []
    for thread in threads:
        thread.join(10)
    assert done == [6, 6]
    with made.held(Path("2")):  # nor later
        assert made.fetched == 6
