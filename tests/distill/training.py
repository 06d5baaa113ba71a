"""What a training run leaves behind, and runs of several processes."""

import json
import os
import signal
import socket
import time
import traceback

import torch
from accelerate.state import AcceleratorState

from linmu_distill.run import distill
from linmu_distill.train import StageTrainer


def curve(folder):
    """Every record of a stage, timing left out."""
    noise = ("tokens_per_second", "peak_memory_mb", "seconds", "step_seconds")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in noise and not k.startswith("share/")} for line in lines
    ]


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


def dying_in(number):
    """A trainer's `on_step`, in the last of the processes: it dies in stage `number`, once its step 2 is on disk."""

    def on_step(trainer, step):
        last = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1
        if trainer.stage.number == number and step == 3 and last:
            while not (trainer.store.folder / "step-000000002").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def killed_in_each_stage(config, processes):
    """A whole run, in which the last of the processes dies in each stage, and which is gone on with."""

    def work(number):
        def train(rank):
            torch.set_num_threads(1)
            on_step = dying_in(number)
            begin = StageTrainer.__post_init__

            def post_init(trainer):
                begin(trainer)
                trainer.on_step = lambda step: on_step(trainer, step)

            StageTrainer.__post_init__ = post_init
            AcceleratorState._reset_state(True)
            distill(config, resume=True)

        return train

    for number in (1, 2, 3):
        statuses = in_processes(processes, work(number))
        assert statuses[-1] == -signal.SIGKILL and all(statuses)
    assert in_processes(processes, work(None)) == [0] * processes
