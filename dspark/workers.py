"""Independent pieces of work: one after another, in several processes, or on a Ray cluster."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Task, Result = TypeVar("Task"), TypeVar("Result")


def run_locally(work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, gpus: int = 0) -> Iterator[tuple[Task, Result]]:
    """One job: here. More: each task in a process, as they finish. No task waits inside the pool, where Ctrl-C would not reach it."""
    if jobs == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    todo = iter(tasks)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, task): task for task in islice(todo, jobs)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                running |= {pool.submit(work, task): task for task in islice(todo, 1)}


def run_on_ray(work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, gpus: int = 0) -> Iterator[tuple[Task, Result]]:
    """The same on a Ray cluster: a running one, else a local one with ``jobs`` workers. gpus: that a task needs."""
    try:
        import ray
    except ImportError:
        raise ValueError("engine 'ray' needs the package ray: pip install 'dspark[ray]', or use --engine local") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError:
            ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(lambda task: work(task))  # a partial is no function to Ray
    waiting = {remote.remote(task): task for task in tasks}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        yield waiting.pop(done), ray.get(done)


ENGINES = {"local": run_locally, "ray": run_on_ray}


def check_engine(engine: str, jobs: int) -> None:
    """Raises ValueError for an unknown engine or less than one job."""
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
