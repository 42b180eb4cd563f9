"""Records become rows: in this process, or in several with a progress bar, kept in a folder for the next run."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_lora.data.encoded import Collector, EncodedRecords, Outcome, Part, opened, part_of
from lightning_lora.data.record import BadRows, Record

Encode = Callable[[Record], Outcome]

_CHUNK = 500  # records that a process is given at once
_MOST = 16  # processes, which is about as many as one can read for
_STALE = 3600  # seconds after which a folder that nobody finished is of a run that has died


def encode_in_memory(records: Iterable[Record], encode: Encode, bad: BadRows) -> EncodedRecords:
    """Encode records one after another.

    Args:
        records: The records.
        encode: What makes rows of one, or raises ``ValueError``.
        bad: Where it is noted what is wrong with records.
    """
    collector = Collector()
    for chunk in _chunks(records):
        collector.add(_part(encode, chunk))
    bad.errors += collector.errors
    return collector.finish()


def encode_in_folder(
    records: Iterable[Record], encode: Encode, bad: BadRows, folder: Path, name: str
) -> EncodedRecords:
    """Encode records in as many processes as there are cores, and keep the rows in a folder, which is there when whole.

    Args:
        records: The records.
        encode: What makes rows of one, or raises ``ValueError``.
        bad: Where it is noted what is wrong with records.
        folder: Where the rows go.
        name: What is read, for the progress bar.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If records are bad and not to be skipped.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        part = folder.with_name(f"{folder.name}.{uuid4().hex}.part")
        part.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from None
    collector = Collector(part)
    try:
        with _progress(name) as advance:
            for found in _in_processes(records, encode):
                collector.add(found)
                advance(len(found.arrays["shares"]) + len(found.errors))
        bad.errors += collector.errors
        if bad.on_error != "skip":
            bad.report()
        collector.errors = bad.errors  # with those that the reader found
        collector.finish()
        _publish(part, folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        collector.close()
        shutil.rmtree(part, ignore_errors=True)
    return opened(folder)[0]


def _publish(part: Path, folder: Path) -> None:
    for file in part.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())  # or a power cut could keep the new name without the content
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # where it is, another run was faster
            raise


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"{folder.parent}: found no way to keep the encoded rows there ({error}), expected a folder with room. Set "
        "data.cache_dir to another one."
    )


def _remove_stale(parent: Path) -> None:
    for part in parent.glob("*.part"):
        try:
            if all(time.time() - file.stat().st_mtime > _STALE for file in [part, *part.iterdir()]):
                shutil.rmtree(part, ignore_errors=True)
        except FileNotFoundError:  # another run has finished or removed it just now
            continue


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    source = iter(records)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


def _part(encode: Encode, records: list[Record]) -> Part:
    def outcome(record: Record) -> Outcome | ValueError:
        try:
            return encode(record)
        except ValueError as error:
            return error

    return part_of(map(outcome, records))


def _in_processes(records: Iterable[Record], encode: Encode) -> Iterator[Part]:
    """The parts in the order of the records, of which not many more are read than the processes have taken."""
    chunks = _chunks(records)
    # In this process, so that what is said once, such as a warning, is not said by each of the others.
    yield from (_part(encode, chunk) for chunk in islice(chunks, 1))
    processes = min(_MOST, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1)
    if processes < 2:  # elsewhere, processes that share what is loaded are not safe
        yield from (_part(encode, chunk) for chunk in chunks)
        return
    waiting: deque[Future[Part]] = deque()
    with _quiet_tokenizers():
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start, (encode,))
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_chunk, chunk))
                if len(waiting) > 3 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# Of a process of the pool: what it was started with, which need not be something that can be pickled.
_encode: Encode


def _start(encode: Encode) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is killed, which could not tell it so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(records: list[Record]) -> Part:
    return _part(_encode, records)


@contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """Keep the threads of tokenizers, and their warning about forks, out of the processes."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int], Any]]:
    with Progress(
        TimeElapsedColumn(), BarColumn(), TextColumn("{task.completed:,} rows of {task.description}")
    ) as progress:
        task = progress.add_task(name, total=None)
        yield lambda rows: progress.advance(task, rows)
