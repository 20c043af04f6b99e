"""Rows of tensors on disk, in shards.

A cache is a set of safetensors shards. A shard's name is a digest of all that its content depends on, so a changed
picture, caption or setting is another shard, an interrupted build goes on where it was, and several runs share one
folder. Items are encoded in batches whose boundaries are fixed by their position, because the last bits of an encoded
picture depend on the size of its batch.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from rasengan import first_line, imaging, locks, memory
from rasengan.files import write_atomically, writing
from rasengan.processes import gather, is_first, wait_for_everyone
from rasengan.row_file import RowFile


ITEMS_PER_SHARD = 64


class ShardedCache:
    """Rows of tensors on disk, looked up by item: a picture's digest, or a caption.

    Rows are read one at a time, so host memory does not grow with the data set.
    """

    def __init__(self, directory: Path, settings: dict, items: Iterable[str]):
        self.directory, self.items = directory, list(dict.fromkeys(items))
        self._positions = {item: position for position, item in enumerate(self.items)}
        self._paths = [
            directory / f"{digest_of([settings, self.items[start : start + ITEMS_PER_SHARD]])}.safetensors"
            for start in range(0, len(self.items), ITEMS_PER_SHARD)
        ]
        self._open = {}

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there, or are damaged; reads all that are there."""
        return [number for number, path in enumerate(self._paths) if not _is_whole(path)]

    def paths(self) -> list[Path]:
        """Return the files of its shards."""
        return list(self._paths)

    def items_in(self, shards: list[int]) -> list[str]:
        """Return the items of some shards, in order."""
        return [item for n in shards for item in self.items[n * ITEMS_PER_SHARD : (n + 1) * ITEMS_PER_SHARD]]

    def build(
        self,
        shards: list[int],
        encode: Callable[[list[str]], dict[str, torch.Tensor]],
        batch_size: int,
        on_items: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Encode and write some shards.

        Args:
            shards: their numbers, a process's share of `missing`.
            encode: returns one row for each item of a batch, on any device.
            batch_size: items that are encoded together.
            on_items: called with the size of each batch that is done.
        """
        for number in shards:
            items = self.items_in([number])
            batches = []
            for start in range(0, len(items), batch_size):
                batch = encode(items[start : start + batch_size])
                batches.append({name: rows.cpu() for name, rows in batch.items()})
                on_items(len(items[start : start + batch_size]))
            tensors = {name: torch.cat([batch[name] for batch in batches]).contiguous() for name in batches[0]}
            content = save(tensors, metadata={"crc32": str(_checksum(tensors))})
            needed_bytes = len(content) * len(self.items) // len(items)
            with writing(self.directory, "Make room, or give another --conditioning_cache_dir.", needed_bytes):
                write_atomically(self._paths[number], content)

    def __getitem__(self, item: str) -> dict[str, torch.Tensor]:
        number, row = divmod(self._positions[item], ITEMS_PER_SHARD)
        try:
            if number not in self._open:
                self._open[number] = RowFile(self._paths[number])
            return self._open[number].read(row)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
            raise imaging.PictureChanged(
                f"{self._paths[number]} of the cache was changed while the run used it: {reason}."
            ) from error

    def __getstate__(self) -> dict:
        # A data worker that is started afresh opens the files itself.
        return self.__dict__ | {"_open": {}}


def fill(
    share: tuple[int, int],
    caches: list[ShardedCache],
    batch_size: int,
    load_encoder: Callable[[], Callable],
    make_bar: Callable[[int], tqdm],
    what: str,
    budget_gib: float | None = None,
    smaller: str | None = None,
) -> None:
    """Build what is missing or damaged, each process on a machine its share; the encoder is loaded only if needed.

    Another run that builds in the same folder is waited for. Machines do not share the work: their disks may be their
    own. The encoder leaves memory at the end.

    Args:
        share: this process's number on its machine, and how many there are on it.
        caches: that one encoder fills.
        batch_size: items that are encoded together.
        load_encoder: returns the function that encodes a batch.
        make_bar: returns a progress bar for a number of items.
        what: the items are, for errors.
        budget_gib: what --vram_budget_gib was given, to which PyTorch keeps already; None for nothing.
        smaller: how the user makes a batch take less memory; None for no way.

    Raises:
        UserError: the card's memory does not suffice.
    """
    number, processes = share
    if not any(gather([any(shards.missing() for shards in caches)])):
        return
    # Held by one process alone, since machines of a run may share a folder.
    with locks.only_builder(caches[0].directory) if is_first() else nullcontext():
        wait_for_everyone()  # the others come once it is held
        shares = [shards.missing()[number::processes] for shards in caches]
        wait_for_everyone()  # all have seen what is missing before anyone builds
        if any(shares):
            with memory.must_suffice(f"loading what encodes {what}", budget_gib):
                encode = load_encoder()
            total = sum(len(shards.items_in(share)) for shards, share in zip(caches, shares, strict=True))
            doing = f"encoding {what}, {batch_size} at once"
            with memory.must_suffice(doing, budget_gib, smaller), make_bar(total) as bar:
                for shards, share in zip(caches, shares, strict=True):
                    shards.build(share, encode, batch_size, bar.update)
            del encode
            memory.give_back()
        wait_for_everyone()


def digest_of(content: object) -> str:
    """Return a digest of what JSON can say."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        # Their names and shapes too: the file's header may be what is damaged.
        total = zlib.crc32(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode(), total)
        total = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy(), total)
    return total


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as shard:
            expected = shard.metadata()["crc32"]
            return str(_checksum({name: shard.get_tensor(name) for name in shard.keys()})) == expected
    except (OSError, SafetensorError, TypeError, KeyError):
        return False
