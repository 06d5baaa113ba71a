"""Goes on with a training's data sets in fewer processes than began it."""

from collections import Counter
from typing import Any

from linmu_models.chat import ChatProcessor, Conversation

from .stream import RecordStream


class Lanes:
    """What several processes read once, read by one: batch i is the next of lane i mod the number of lanes.

    A process that goes on in the place of others so trains on what each of them would have been given. It is a `Stream`
    whose state holds that of each of its own lanes, in their order.
    """

    def __init__(self, stream: RecordStream, states: list[dict[str, Any]], rank: int, processes: int) -> None:
        """Take lanes `rank`, `rank + processes`, ... of a training whose lanes were at `states`.

        Args:
            stream: any process's; its data sets are read.
            processes: divides the number of lanes.
        """
        self._number = len(states)
        self._lanes: dict[int, RecordStream] = {}
        for lane in range(rank, self._number, processes):
            self._lanes[lane] = stream.of_process(lane, self._number)
            self._lanes[lane].load_state_dict(states[lane])
        self.processor: ChatProcessor = stream.processor
        self.packing = stream.packing

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """For each data set, records of all lanes that were `read`, `used`, and left out, by reason."""
        every = [lane.counts for lane in self._lanes.values()]
        return {name: sum((counts[name] for counts in every), Counter()) for name in every[0]}

    def samples(self, index: int) -> list[Conversation]:
        """The next batch of the lane and the set that `index` chooses."""
        return self._lanes[index % self._number].samples(index)

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
