"""Records: which shards of a label set are finished, while a job writes it. They lie in blocks of 1,000 shards.

The records of the shards 3000 to 3999 lie in the folder ``records/00003/``: as many names as an object store lists in
one request. Once each shard of a block is recorded or claimed, the block has a mark, ``records/00003.taken``, and
workers that look for a free shard do not list it. So a look costs a few list requests, however many shards there are.

Whoever gives up a claim without a record removes the mark. Marks only save requests: the worker that is to write the
manifest lists all blocks, and first removes the marks of those in which a record is missing.
"""

import itertools
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence

from stl_offline.labels.manifest import shard_name
from stl_offline.labels.store.layout import RECORDS
from stl_offline.labels.store.storage import Storage

BLOCK_SHARDS = 1000
# To say how much is left, a worker lists so many blocks.
_LISTED_BLOCKS = 8


class Records:
    """The records of a label set's shards from number ``first`` on; those below are in its manifest already."""

    def __init__(self, storage: Storage, num_shards: int, container: str, *, first: int = 0) -> None:
        self._storage = storage
        self._num_shards, self._container, self._first = num_shards, container, first
        self._blocks = range(first // BLOCK_SHARDS, -(-num_shards // BLOCK_SHARDS))

    def path(self, index: int) -> str:
        """Where the record of shard ``index`` lies."""
        return f"{_folder(index // BLOCK_SHARDS)}/{self._name(index)}"

    def shards(self, block: int) -> range:
        """The shards of a block."""
        return range(max(self._first, block * BLOCK_SHARDS), min((block + 1) * BLOCK_SHARDS, self._num_shards))

    def recorded(self, block: int) -> set[int]:
        """The shards of a block that have a record. One listing."""
        names = set(self._storage.names(_folder(block)))
        return {index for index in self.shards(block) if self._name(index) in names}

    def all_recorded(self) -> set[int]:
        """The shards that have a record, from a listing of every block."""
        return set().union(*map(self.recorded, self._begun()))

    def folders(self) -> list[str]:
        """The folders of the blocks that have records. One listing."""
        return [_folder(block) for block in self._begun()]

    def left(self) -> list[int]:
        """The shards without a record; an estimate where more than eight blocks have been begun.

        Of these eight are listed, first those without a mark. Of the others without a mark, the same share is taken to
        be left; of those with one, nothing.
        """
        names = set(self._storage.names(RECORDS))
        marked = {block for block in self._blocks if _mark(block) in names}
        begun = [block for block in self._blocks if block in marked or _block_name(block) in names]
        left = {block: list(self.shards(block)) for block in self._blocks}
        total = left_of_open = 0
        for place, block in enumerate(sorted(begun, key=marked.__contains__)):
            shards = left[block]
            if place < _LISTED_BLOCKS:
                done = self.recorded(block)
                left[block] = [index for index in shards if index not in done]
                total, left_of_open = total + len(shards), left_of_open + len(left[block])
            else:
                left[block] = [] if block in marked else shards[: round(len(shards) * left_of_open / total)]
        return [index for shards in left.values() for index in shards]

    def pick_block(self, claimed: Iterable[int], *, is_shared: bool) -> int | None:
        """A block without a mark, or None. One listing.

        Among several workers it is one of those with the fewest shards in ``claimed``, so with the fewest workers.
        """
        names = set(self._storage.names(RECORDS))
        blocks = [block for block in self._blocks if _mark(block) not in names]
        if not blocks or not is_shared:
            return blocks[0] if blocks else None
        workers = Counter(index // BLOCK_SHARDS for index in claimed)
        fewest = min(workers[block] for block in blocks)
        return secrets.choice([block for block in blocks if workers[block] == fewest])

    def find_free(
        self, block: int | None, claimed: set[int], *, is_shared: bool, are_new: bool
    ) -> tuple[int | None, list[int]]:
        """A block with shards that are neither recorded nor ``claimed``, and these: this block, or another one.

        None and no shards where there is none. Unless the claims ``are_new``, a block without free shards is given back
        as it is: with old claims it must not be marked.
        """
        while block is not None or (block := self.pick_block(claimed, is_shared=is_shared)) is not None:
            taken = self.recorded(block) | claimed
            free = [index for index in self.shards(block) if index not in taken]
            if free or not are_new:
                return block, free
            self.mark(block)
            block = None
        return None, []

    def mark(self, block: int) -> None:
        """Note that each shard of a block is recorded or claimed."""
        self._storage.write(f"{RECORDS}/{_mark(block)}", b"")

    def reopen(self, shards: Iterable[int]) -> None:
        """Remove the marks of the blocks of these shards, which are neither recorded nor claimed."""
        for block in {index // BLOCK_SHARDS for index in shards}:
            self._storage.remove_file(f"{RECORDS}/{_mark(block)}")

    def _begun(self) -> list[int]:
        names = set(self._storage.names(RECORDS))
        return [block for block in self._blocks if _block_name(block) in names]

    def _name(self, index: int) -> str:
        return f"{shard_name(index, self._num_shards, self._container)}.json"


def _block_name(block: int) -> str:
    return f"{block:05d}"


def _mark(block: int) -> str:
    return f"{_block_name(block)}.taken"


def _folder(block: int) -> str:
    return f"{RECORDS}/{_block_name(block)}"


def pick_start(free: Sequence[int]) -> int:
    """Where in these shards, which are sorted, a worker begins among others: inside one of the longest runs.

    Workers go on from where they are. So another one will need long to get there, and each has to look for other shards
    less than half as often as from a random start. Chance keeps workers that look at the same moment apart.
    """
    ends = [place for place in range(1, len(free)) if free[place] != free[place - 1] + 1]
    runs = sorted(itertools.pairwise([0, *ends, len(free)]), key=lambda run: run[0] - run[1])
    first, last = secrets.choice(runs[: max(1, len(runs) // 4)])
    return first + (last - first) // 4 + secrets.randbelow((last - first + 1) // 2)
