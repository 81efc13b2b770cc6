"""What each program of tests/clients says: one line for each unit of work (tests/src/clients.rs)."""

import asyncio
import os
import sys
import threading
import time

RUN = int(os.environ["RUN"])
FIRST = int(os.environ["WORKER"])
STOP = os.environ["STOP"]
WORKERS = 2
THINK = 0.005
_lock = threading.Lock()


def say(line):
    with _lock:
        sys.stdout.write(line.replace("\n", " ") + "\n")
        sys.stdout.flush()


class Wrong(Exception):
    """An answer that is not the right one."""


def right(seen, wanted):
    if seen != wanted:
        raise Wrong(f"{seen!r} instead of {wanted!r}")


def state_of(error):
    """The SQLSTATE behind an exception of any of these libraries."""
    while error is not None:
        for name in ("sqlstate", "pgcode"):
            state = getattr(error, name, None)
            if state:
                return state
        if error.args and isinstance(error.args[0], dict):
            return error.args[0].get("C", "-")
        if len(error.args) == 2 and isinstance(error.args[0], str) and len(error.args[0]) == 5:
            return error.args[0]
        error = getattr(error, "orig", None) or error.__cause__
    return "-"


class Worker:
    """One client: gives out ids, and says what has become of them."""

    def __init__(self, number):
        self.number, self.count, self.ids = FIRST + number, 0, []

    def id(self):
        self.count += 1
        self.ids.append(self.number * 1_000_000 + self.count)
        return self.ids[-1]

    def told(self, op, error=None):
        ids, self.ids = ",".join(map(str, self.ids)) or "-", []
        if error is None:
            say(f"{self.number} {op} ok {ids}")
        elif isinstance(error, Wrong):
            say(f"{self.number} {op} wrong {error}")
        else:
            say(f"{self.number} {op} error {state_of(error)} {ids} {type(error).__name__}: {error}")


def threads(body):
    """Runs `body(worker)`, which gives a list of functions and what to do after an error, in threads."""

    def loop(number):
        worker, again = Worker(number), True
        while not os.path.exists(STOP):
            try:
                if again:
                    ops, after, again = *body(worker), False
            except Exception as error:
                worker.told("connect", error)
                time.sleep(0.2)
                continue
            for op in ops:
                if os.path.exists(STOP):
                    return
                try:
                    op()
                    worker.told(op.__name__)
                except Exception as error:
                    worker.told(op.__name__, error)
                    try:
                        after()
                    except Exception as error:
                        worker.told("after", error)
                        again = True
                        break
                time.sleep(THINK)

    all_of_them = [threading.Thread(target=loop, args=(n,)) for n in range(WORKERS)]
    for one in all_of_them:
        one.start()
    for one in all_of_them:
        one.join()


async def tasks(body):
    """The same with coroutines."""

    async def loop(number):
        worker = Worker(number)
        ops, after = await body(worker)
        while not os.path.exists(STOP):
            for op in ops:
                if os.path.exists(STOP):
                    return
                try:
                    await op()
                    worker.told(op.__name__)
                except Exception as error:
                    worker.told(op.__name__, error)
                    await after()
                await asyncio.sleep(THINK)

    await asyncio.gather(*(loop(n) for n in range(WORKERS)))
