"""The views that training is at: a token cache of some views of a label set, and the next one made meanwhile.

A cache of all V views grows with V. A run needs one view in each epoch, so here a cache holds a *span*: as many
consecutive views as fit into `SPAN_BYTES`, at least those that are read together. While training reads one span, a
thread makes the next. Then the one before is removed. A set whose views all fit into one span has one cache, which is
kept.

A span is made from whole shards. Where each shard holds the views of many spans, each span reads them all:
`stl_offline.labels.convert.convert` divides such a set into parts of as many views as a span has.

Caches of spans are named by their content as whole ones are, so runs share those that they need at the same time. A
run may begin at any view: what is there is opened, and the rest is made from the label set again.

n: images; V: views of each.
"""

import logging
import threading

import numpy as np

from stl_offline.errors import StlError
from stl_offline.labels.cache import CacheMaker
from stl_offline.labels.cache_file import TokenCache, cache_bytes
from stl_offline.labels.spec import LabelSpec

# Two spans are on disk at a time, or more (`run_bytes`). ImageNet-1K has 350 MB of one draw for each token of a view,
# and 8.6 GB of top-5.
SPAN_BYTES = 1_000_000_000
_CLOSE_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


def span_views(spec: LabelSpec, n: int, repeats: int = 1) -> int:
    """How many views of n images a cache holds: those of whole groups of ``repeats``, which are read together."""
    each = cache_bytes(spec.of_views(range(1)), n)
    groups = max(1, SPAN_BYTES // each // repeats)
    return min(spec.views_per_image, groups * repeats)


def run_bytes(spec: LabelSpec, n: int, repeats: int = 1) -> int:
    """The most bytes that the caches of a run over n images take at a time. repeats: as of `ViewsAhead`.

    That is the span in use and the next one. If V is no multiple of repeats, a group of views can need the end of a
    span, the next one and, behind a shorter last span, the first. All stay mapped while one more is made.
    """
    span, views = span_views(spec, n, repeats), spec.views_per_image
    if 2 * span >= views or views % repeats == 0:
        return cache_bytes(spec.of_views(range(min(2 * span, views))), n)
    spans = [span] * 3
    if views % span <= repeats - 2:
        spans.append(views % span)
    # Views that are made again while they are mapped count twice, so this can be more than all V.
    return sum(cache_bytes(spec.of_views(range(each)), n) for each in spans)


class ViewsAhead:
    """Gives the token cache with the view of each epoch.

    Args:
        maker: of the caches.
        repeats: of how many consecutive epochs the views are read together; a span holds those of whole groups.

    spec: of all views; labelled: bool (n,), whether an image has labels.

    Raises: as `stl_offline.labels.cache.build_token_cache`; so do the methods.
    """

    def __init__(self, maker: CacheMaker, repeats: int = 1) -> None:
        self._maker = maker
        self.spec = maker.spec
        self._span = span_views(maker.spec, maker.images, repeats)
        self._now: tuple[range, TokenCache] | None = None
        self._next: _Making | None = None
        if self._span == len(maker.views):
            self._now = maker.views, maker.make(maker.views)
            self.labelled = np.asarray(self._now[1].labelled) > 0
        else:
            # Labels that do not belong to the images are found before training; which view it begins at is not known.
            self.labelled = maker.join(0).shard >= 0

    def of_epoch(self, epoch: int, epochs: int) -> tuple[TokenCache, int]:
        """The cache that holds the view of an epoch, number ``epoch`` mod V, and the view's place in it.

        If one of ``epochs`` comes to the next span, that is made in the background from now on.
        """
        view = epoch % len(self._maker.views)
        now = self._span_of(view)
        if self._now is None or self._now[0] != now:
            after = self._span_of(now.stop % len(self._maker.views))
            self._now = now, self._take(now, after)
            if epochs - epoch > now.stop - view:
                self._next = _Making(self._maker, after, (now, after))
        return self._now[1], view - now.start

    @property
    def span(self) -> int:
        """How many views a cache holds; the last one may hold fewer."""
        return self._span

    def bytes_read(self) -> tuple[int, int]:
        """Bytes of shards that making the caches of all views once reads, and the bytes of all shards."""
        read = held = 0
        for label_set, views in self._maker.parts:
            size = sum(label_set.shards[index].bytes for index in label_set.present)
            held += size
            read += size * len({view // self._span for view in views})
        return read, held

    def close(self) -> None:
        """End the work in the background."""
        if self._next is not None:
            self._next.end()
            self._next = None

    def _take(self, views: range, after: range) -> TokenCache:
        made, self._next = self._next, None
        if made is not None:
            if made.views == views:
                try:
                    return made.wait()
                except StlError as error:  # a store that was out of reach hours ago may be back
                    _LOG.warning("reading the next views ahead failed (%s); trying again", error)
            made.end()
        return self._maker.make(views, keep=(views, after))

    def _span_of(self, view: int) -> range:
        start = view - view % self._span
        return range(start, min(start + self._span, len(self._maker.views)))


class _Making(threading.Thread):
    """Makes one cache in the background."""

    def __init__(self, maker: CacheMaker, views: range, keep: tuple[range, range]) -> None:
        # A program that ends does not wait for it: what is half made has a temporary name.
        super().__init__(daemon=True, name="stl-offline-views")
        self.views = views
        self._maker, self._keep = maker, keep
        self._stop_asked = threading.Event()
        self._made: TokenCache | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._made = self._maker.make(self.views, keep=self._keep, stop=self._stop_asked)
        except BaseException as error:  # whoever waits must hear of it
            self._error = error

    def wait(self) -> TokenCache:
        """The cache; raises what its making raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._made

    def end(self) -> None:
        """Stop after the shard that is being read. It may wait for another process's cache; then it is left alone."""
        self._stop_asked.set()
        self.join(_CLOSE_SECONDS)
