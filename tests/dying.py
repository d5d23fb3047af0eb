"""A process that dies at one of its file operations, played in this one."""

import builtins
import contextlib
import io
import os
from collections.abc import Iterator
from unittest import mock

CHANGING = ("replace", "unlink", "fsync", "mkdir")  # of os


class Died(BaseException):
    """The process is gone: nothing of it catches this."""


class Operations:
    """How many file operations there were."""

    count = 0


@contextlib.contextmanager
def dies_at(number: float) -> Iterator[Operations]:
    """In the block, the file operation of that number raises :class:`Died`, and so does every one after it.

    So what would tidy up afterwards does not either. A file that was to be opened for writing is left half written.
    """
    operations = Operations()

    def counted(function, name=None):
        def operation(*args, **kwargs):
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
            if name == "open" and (isinstance(args[0], int) or not set(mode) & set("wax+")):
                return function(*args, **kwargs)
            operations.count += 1
            if operations.count >= number:
                if name == "open" and operations.count == number:
                    with function(args[0], "wb") as file:
                        file.write(b"half of wh")
                raise Died
            return function(*args, **kwargs)

        return operation

    with contextlib.ExitStack() as stack:
        for name in CHANGING:
            stack.enter_context(mock.patch.object(os, name, counted(getattr(os, name))))
        for module in (builtins, io):
            stack.enter_context(mock.patch.object(module, "open", counted(module.open, "open")))
        yield operations
