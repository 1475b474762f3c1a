"""How fast work is done, and when it will be finished. It is estimated from the times at which tasks end.

Tasks end in bursts if several workers compute equal ones. The first ones end late, because workers load and compile. Reading a
result from disk takes no time. So ends that are near each other count as one. The rate is the slope of a line through the ends in
the last two thirds of the time. Between two ends, work is assumed to continue along that line.
"""

from dataclasses import dataclass, field
from itertools import pairwise

FREE_SECONDS = 0.5  # seconds: what is done earlier was read from disk
NEAR = 0.05  # share of the time since the beginning: ends within it count as one
TASKS_AT_ONCE = 4  # share of the largest task so far, if nobody says how much work is computed at a time
SPAN = 0.1  # share of the time since the beginning: ends that are closer do not give a rate


@dataclass
class Pace:
    """Work done over time. Times are in seconds since the work began. Work is in any unit, such as multiply-accumulates."""

    total: float
    """All work."""
    in_flight: float | None = None
    """Most work that is computed at a time, if it is known. Needed if tasks differ in their work."""
    done: float = 0.0
    """Work of the tasks that have ended."""
    _largest: float = 0.0
    """Work of the largest task that has ended."""
    _ends: list[tuple[float, float, float]] = field(default_factory=lambda: [(0.0, 0.0, 0.0)])
    """(first time, last time, work) of groups of tasks that ended."""

    def add(self, now: float, amount: float) -> None:
        """A task of this amount has ended."""
        self.done += amount
        self._largest = max(self._largest, amount)
        first, last, _ = self._ends[-1]
        if now < FREE_SECONDS:
            self._ends = [(now, now, self.done)]
        elif len(self._ends) > 1 and now <= first * (1 + NEAR):
            self._ends[-1] = (first, max(last, now), self.done)
        else:
            self._ends.append((now, now, self.done))

    def eta(self, now: float) -> float | None:
        """Seconds until all is done; None before the first task has ended."""
        if self.done >= self.total:
            return 0.0
        rate, expected = self._pace(now)
        return (self.total - expected) / rate if rate else None

    def expected(self, now: float) -> float:
        """Work done, including the done part of the tasks that still run."""
        return self._pace(now)[1]

    def _pace(self, now: float) -> tuple[float, float]:
        """(rate, or 0 if it is unknown; expected work)."""
        ends = self._counted(now)
        if len(ends) < 2:
            return 0.0, self.done
        times, work = [last for _, last, _ in ends], [amount for _, _, amount in ends]
        mean_time, mean_work, span = sum(times) / len(times), sum(work) / len(work), times[-1] - times[0]
        rate = sum((t - mean_time) * (w - mean_work) for t, w in zip(times, work, strict=True))
        rate /= sum((t - mean_time) ** 2 for t in times)
        if rate <= 0:
            return 0.0, self.done
        expected = mean_work + rate * (now - mean_time)
        groups = (later - earlier for (_, _, earlier), (_, _, later) in pairwise(ends))
        in_flight = max(TASKS_AT_ONCE * self._largest, *groups) if self.in_flight is None else self.in_flight
        most = self.done + in_flight
        # all running tasks should have ended by now: they have become slower, or a worker is lost
        overdue = max(0.0, expected - most) / rate
        return rate * span / (span + overdue), min(max(self.done, expected), most, self.total)

    def _counted(self, now: float) -> list[tuple[float, float, float]]:
        """The ends in the last two thirds of the time, without a burst that may continue. More of them if these give no rate."""
        ends = self._ends
        settled = ends[:-1] if len(ends) > 3 and now <= ends[-1][0] * (1 + NEAR) else ends
        recent = [end for end in settled if end[1] >= now / 3]
        if len(recent) < 2 or recent[-1][1] - recent[0][1] < SPAN * recent[-1][1]:
            recent = settled[-2:]
        if len(recent) < 2 or recent[-1][1] - recent[0][1] < SPAN * recent[-1][1] or self._is_less_than_a_round(recent):
            recent = settled
        return recent

    def _is_less_than_a_round(self, ends: list[tuple[float, float, float]]) -> bool:
        """Whether less was done between the ends than is computed at a time: two workers that began together end nearly so."""
        return self.in_flight is not None and ends[-1][2] - ends[0][2] < self.in_flight
