"""
What is taken back however a block ends: also by an interruption, wherever it falls, the taking back included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


@contextmanager
def afterwards(undo: Callable[[], object]) -> Iterator[None]:
    """
    Run `undo` after the block.

    It runs twice, so that one that was interrupted is completed: it must not mind. A generator takes it back
    even where an interruption falls between the block's last line and its end, when Python calls no
    `__exit__`: it is closed.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def unless_completed(undo: Callable[[], object]) -> Iterator[None]:
    """Run `undo`, as `afterwards` does, if something is raised in the block."""
    try:
        try:
            yield
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise


@contextmanager
def unwound() -> Iterator[ExitStack]:
    """A stack of things to take back after the block, each once."""
    stack = ExitStack()
    with afterwards(stack.close):
        yield stack


@contextmanager
def held(lock: AbstractContextManager) -> Iterator[None]:
    """Hold a lock in the block."""
    with unwound() as stack:
        stack.enter_context(lock)
        yield
