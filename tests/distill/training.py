"""What a training run leaves behind, and runs of several processes."""

import json
import os
import socket
import traceback


def curve(folder):
    """Every record of a stage, timing left out."""
    noise = ("tokens_per_second", "peak_memory_mb", "seconds")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in noise} for line in lines]


def in_processes(count, work):
    """`work(rank)` in so many processes, joined as `accelerate launch` joins them; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            status = 1
            try:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
                )  # fmt: skip
                work(rank)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
