"""Several processes or threads at once."""

import socket
import threading


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(count):
    """What `accelerate launch --cpu` puts into the environment of each of the processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    ranks = [str(rank) for rank in range(count)]
    return [{"WORLD_SIZE": str(count), "RANK": rank, "LOCAL_RANK": rank, **place} for rank in ranks]


def in_threads(*functions, ignored=()):
    """Start functions at one barrier, and raise what any of them raises."""
    barrier, errors = threading.Barrier(len(functions), timeout=60), []

    def guarded(function):
        barrier.wait()
        try:
            function()
        except ignored:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
