"""Goes on with a training's data sets in fewer processes than began it, or in more."""

from collections import Counter
from typing import Any

from linmu_models.chat import ChatProcessor, Conversation

from .stream import RecordStream


class Lanes:
    """What several processes read once, read by others: batch i is the next of lane i mod the number of lanes.

    So each batch is what it would have been. A process that goes on in the place of several has the lanes of all of
    them. Where there are more processes than lanes, some share one: they take turns at its batches, and each reads all
    of them. It is a `Stream` whose state holds that of each of its own lanes, in their order.
    """

    def __init__(self, stream: RecordStream, states: list[dict[str, Any] | None], rank: int, processes: int) -> None:
        """Take lanes `rank`, `rank + processes`, ... of a training whose lanes were at `states`.

        Args:
            stream: any process's; its data sets are read.
            states: None for a lane that is at its start.
            processes: divides the number of lanes, or is divided by it.
        """
        self.number = len(states)
        self._turns, self._turn = max(processes // self.number, 1), rank // self.number
        self._lanes: dict[int, RecordStream] = {}
        for lane in range(rank % self.number, self.number, processes):
            self._lanes[lane] = stream.of_process(lane, self.number)
            if (state := states[lane]) is not None:
                self._lanes[lane].load_state_dict(state)
        self.processor: ChatProcessor = stream.processor
        self.packing = stream.packing

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """For each data set, records of all lanes that were `read`, `used`, and left out, by reason. Of those that
        share a lane the first one counts."""
        every = [lane.counts for lane in self._lanes.values()]
        return {name: sum((c[name] for c in every if not self._turn), Counter()) for name in every[0]}

    def samples(self, index: int) -> list[Conversation]:
        """The next batch of the lane and the set that `index` chooses. Those who share a lane must ask in turns."""
        lane, number = index % self.number, index // self.number
        first = number - number % self._turns
        every = [self._lanes[lane].samples(k * self.number + lane) for k in range(first, first + self._turns)]
        return every[number - first]

    def state_dict(self) -> dict[str, Any]:
        """Where each lane is."""
        return {"lanes": [lane.state_dict() for lane in self._lanes.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken."""
        for lane, where in zip(self._lanes.values(), state["lanes"], strict=True):
            lane.load_state_dict(where)

    def close(self) -> None:
        """Stop reading ahead."""
        for lane in self._lanes.values():
            lane.close()
