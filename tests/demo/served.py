"""The page of `linmu demo`, served in a thread. Without the extra, tests that need it are skipped."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='needs pip install "linmu[demo]"')
pytest.importorskip("uvicorn", reason='needs pip install "linmu[demo]"')

from linmu_distill.data.examples import examples
from linmu_models.demo.server import listen, make_server
from linmu_models.demo.shelf import Example, Shelf

TEACHER = Path(__file__).parents[2] / "distill" / "teachers" / "tiny"
EXAMPLES = [Example(*one) for one in examples()]


class Served:
    """A page that is served."""

    def __init__(self, pair, folder, host="127.0.0.1", max_bytes=1 << 20, max_pixels=1 << 20):
        self.folder, self.shelf = folder, Shelf(folder, max_bytes, max_pixels, EXAMPLES)
        listening = listen(host, 0)
        self.port = listening.getsockname()[1]
        self._server = make_server(pair, self.shelf, host)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def close(self):
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


class Slow:
    """In the place of a pair: answers as long as somebody listens."""

    def __init__(self, pair):
        self.teacher, self.student, self.takes_media = pair.teacher, pair.student, True
        self.stopped = threading.Event()
        self.error = None

    def answer(self, question, clip, stop, tell):
        tell({"what": "start", "side": "teacher"})
        if self.error is not None:
            raise self.error
        assert stop.wait(30)
        self.stopped.set()
