"""Undo something however a block ends, even if an interruption falls inside the undoing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


@contextmanager
def afterwards(undo: Callable[[], object]) -> Iterator[None]:
    """
    Run `undo` after the block.

    It runs twice, so that an interrupted `undo` is completed; running it again must be harmless. This is a
    generator because Python calls no `__exit__` if an interruption falls between the block's last line and
    its end, but it does close the generator.
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
    """Yield a stack of things to undo after the block, each once."""
    stack = ExitStack()
    with afterwards(stack.close):
        yield stack


@contextmanager
def held(lock: AbstractContextManager) -> Iterator[None]:
    """Hold a lock for the block."""
    with unwound() as stack:
        stack.enter_context(lock)
        yield
