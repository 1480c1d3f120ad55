"""Batches that are prepared in a thread, while a GPU computes the step before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

END = object()


def prefetch(items: Iterator[Any]) -> Iterator[Any]:
    """The same items in the same order, each computed in a thread while the one before is used.

    An error in the thread is raised here, in the place of the item.
    """
    with ThreadPoolExecutor(1) as thread:  # which is ended when nobody wants more items
        ahead = thread.submit(next, items, END)
        while (item := ahead.result()) is not END:
            ahead = thread.submit(next, items, END)
            yield item
