"""Records: which shards of a label set are finished, while a job writes it. They lie in blocks of 1,000 shards.

The records of the shards 3000 to 3999 lie in the folder ``records/00003/``: as many names as an object store lists in
one request. Once each shard of a block is recorded or claimed, the block has a mark, ``records/00003.taken``, and
workers that look for a free shard do not list it. So a look costs a few list requests, however many shards there are.

Whoever gives up a claim without a record removes the mark. Marks only save requests: the worker that writes the
manifest lists all blocks, and removes the marks of those in which a record is missing.
"""

import secrets
from collections import Counter
from collections.abc import Iterable

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

    def there(self, block: int) -> set[int]:
        """The shards of a block that have a record. One listing."""
        names = set(self._storage.names(_folder(block)))
        return {index for index in self.shards(block) if self._name(index) in names}

    def all(self) -> set[int]:
        """The shards that have a record, from a listing of every block."""
        return set().union(*map(self.there, self._begun()))

    def folders(self) -> list[str]:
        """The folders of the blocks that have records. One listing."""
        return [_folder(block) for block in self._begun()]

    def left(self) -> list[int]:
        """The shards without a record, from a few listings.

        Of further blocks that have been begun, those with a mark count as done, and those without as not begun.
        """
        names = set(self._storage.names(RECORDS))
        marked = {block for block in self._blocks if _mark(block) in names}
        begun = [block for block in self._blocks if block in marked or _name(block) in names]
        done = {block: self.there(block) for block in sorted(begun, key=marked.__contains__)[:_LISTED_BLOCKS]}
        left = {block: self.shards(block) for block in self._blocks if block in done or block not in marked}
        return [index for block, shards in left.items() for index in shards if index not in done.get(block, ())]

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

    def mark(self, block: int) -> None:
        """Note that each shard of a block is recorded or claimed."""
        self._storage.write(f"{RECORDS}/{_mark(block)}", b"")

    def reopen(self, shards: Iterable[int]) -> None:
        """Remove the marks of the blocks of these shards, which are neither recorded nor claimed."""
        for block in {index // BLOCK_SHARDS for index in shards}:
            self._storage.remove_file(f"{RECORDS}/{_mark(block)}")

    def _begun(self) -> list[int]:
        names = set(self._storage.names(RECORDS))
        return [block for block in self._blocks if _name(block) in names]

    def _name(self, index: int) -> str:
        return f"{shard_name(index, self._num_shards, self._container)}.json"


def _name(block: int) -> str:
    return f"{block:05d}"


def _mark(block: int) -> str:
    return f"{_name(block)}.taken"


def _folder(block: int) -> str:
    return f"{RECORDS}/{_name(block)}"
