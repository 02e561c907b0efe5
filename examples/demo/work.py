"""Trainings at once, each in a process with one thread; and one after another in this process."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import Any

from .training import Task, train

Tell = Callable[[Task, int], object]  # a training has finished so many epochs; 0: it begins
Ended = tuple[Task, dict[str, Any]]  # ``seconds`` among what was measured


def trained(tasks: Iterator[Task], processes: int, tell: Tell) -> Iterator[Ended]:
    """Yield each task with what :func:`training.train` found, as they end.

    ``tasks`` is asked for the next one when a process is free. 1 process: this one.
    """
    if processes == 1:
        for task in tasks:
            yield task, timed(task, tell)
        return
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with ProcessPoolExecutor(processes, context, begin, (news,)) as pool:
        running: dict[Future[dict[str, Any]], Task] = {}
        try:
            while True:
                for task in islice(tasks, processes - len(running)):
                    running[pool.submit(work, task)] = task
                if not running:
                    return
                ended = wait(running, timeout=0.1, return_when=FIRST_COMPLETED).done
                pass_on(news, tell)
                for future in ended:
                    yield running.pop(future), future.result()
        except BaseException:  # Ctrl-C among them: do not wait for what is running
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def pass_on(news: multiprocessing.Queue[tuple[Task, int]], tell: Tell) -> None:
    """Call ``tell`` with all that the processes have said."""
    while True:
        try:
            tell(*news.get_nowait())
        except queue.Empty:
            return


def timed(task: Task, tell: Tell) -> dict[str, Any]:
    tell(task, 0)
    start = time.perf_counter()
    found = train(task, lambda epoch: tell(task, epoch))
    return {"seconds": time.perf_counter() - start, **found}


_news: multiprocessing.Queue[tuple[Task, int]]  # in a process that trains: to the one that gives out the work


def begin(news: multiprocessing.Queue[tuple[Task, int]]) -> None:
    global _news
    _news = news
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends the others
    be_a_worker()


def be_a_worker() -> None:
    """Leave the other cores to the other processes, and end when the process that gives out the work does."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def work(task: Task) -> dict[str, Any]:
    return timed(task, lambda _, epoch: _news.put((task, epoch)))
