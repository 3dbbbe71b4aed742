"""Images that cannot be used: an error, or skipped and listed, as `data.on_bad_image` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from distil_tl.data.index import Index
from distil_tl.data.loader import UNREADABLE, Batch
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger, printable


class BadImages:
    """The bad images so far: {split: {path relative to it: reason}}, in `by_split`.

    Args:
        policy: `data.on_bad_image`.
        before: the bad images of the run before it was resumed.
    """

    def __init__(self, policy: str, before: dict[str, dict[str, str]] | None = None) -> None:
        self.policy = policy
        self.by_split: dict[str, dict[str, str]] = {split: dict(images) for split, images in (before or {}).items()}

    def check(self, batches: Iterable[Batch], split: str, index: Index) -> Iterator[Batch]:
        """The same batches, with the policy applied to their bad images.

        Raises:
            UserError: an image cannot be used and the policy is `error`, or its file cannot be read.
        """
        for batch in batches:
            self.apply_policy(batch.faults, split, index)
            yield batch

    def apply_policy(self, faults: Iterable[tuple[int, str]], split: str, index: Index) -> None:
        """Apply the policy to bad images: (position in the index, reason) of each. Raises as `check` does."""
        for i, reason in faults:
            path, name = printable(index.path(i)), printable(index.classes[int(index.targets[i])])
            unreadable = reason.startswith(UNREADABLE)
            if self.policy == "error" or unreadable:
                advice = "Repair or remove it, or skip such images with data.on_bad_image=skip"
                more = ". `distil-tl doctor --images`, with the arguments of this run, names all of them"
                if unreadable:
                    more, advice = "", "Unreadable files are never skipped, as the image may be fine; check the disk"
                raise UserError(f"can't use the image {path} of class {name}: {reason}. {advice}{more}", one_rank=True)
            skipped = self.by_split.setdefault(split, {})
            if index.relative_path(i) not in skipped:
                logger.warning("skipped the image %s of class %s: %s", path, name, reason)
                skipped[index.relative_path(i)] = reason

    def refuse_none_usable(self, counted: int, split: str, index: Index) -> None:
        """Raises UserError if no image of a split could be used.

        Args:
            counted: number of images used, over all ranks.
        """
        skipped = self.by_split.get(split, {})
        if counted == 0 and skipped:
            name, reason = next(iter(skipped.items()))
            raise UserError(
                f"none of the images read from {index.root} can be used, for example {printable(name)}: {reason}. "
                f"Repair them, or set another data.root"
            )

    def combine_ranks(self, info: DistInfo) -> None:
        """Combine the bad images of all ranks. A collective."""
        for of_rank in gather_objects(info, self.by_split):
            for split, images in of_rank.items():
                self.by_split.setdefault(split, {}).update(images)
        self.by_split = {split: dict(sorted(images.items())) for split, images in sorted(self.by_split.items())}
