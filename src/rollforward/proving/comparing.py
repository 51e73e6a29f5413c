"""What a run left, compared with what the undisturbed run left: tensors and series, beyond the noise.

Noise is what differs between two undisturbed runs. A tensor or a field may differ after a kill by as much as
it did there, and by no more.
"""

from dataclasses import dataclass
from math import inf, isnan

from rollforward.inspection.comparing import TensorDifference
from rollforward.proving.leavings import Leavings
from rollforward.proving.series import SeriesCompared, compare_series
from rollforward.proving.tensors import TensorsCompared, compare_tensors


@dataclass(kw_only=True)
class Compared:
    """Two runs, compared."""

    tensors: TensorsCompared
    series: list[SeriesCompared]
    others: int
    """How many files of the first run are of no kind that is compared."""

    @property
    def anything(self) -> bool:
        """Whether there was anything to compare."""
        return bool(self.tensors.names or self.tensors.differences or self.series)

    @property
    def differs(self) -> bool:
        """Whether anything that counts differs.

        Where the tensors prove that a step was done, it is only the log that lacks it.
        """
        steps = any(one.extra or (one.missing and not self.tensors.names) for one in self.series)
        return bool(steps or self.tensors.differences or any(one.differences for one in self.series))

    @property
    def first(self) -> SeriesCompared | None:
        """The series in which the two part first."""
        parted = [one for one in self.series if one.differences or one.missing or one.extra]
        return min(
            parted, key=lambda one: one.differences[0].step if one.differences else (inf,), default=None
        )


def compare(a: Leavings, b: Leavings, noise: Compared | None = None) -> Compared:
    """Compare what two runs left; differences within the noise are left out."""
    tensors = compare_tensors(a, b)
    fields: dict[str, dict[str, float]] = {}
    if noise is not None:
        known = {(item.role, item.name): _size(item) for item in noise.tensors.differences}
        tensors.differences = [
            item for item in tensors.differences if _size(item) > known.get((item.role, item.name), -1.0)
        ]
        fields = {one.path: {item.name: item.largest for item in one.differences} for one in noise.series}
    series = []
    for path in a.series:
        one = a.read(path)
        if one.rows:
            series.append(compare_series(path, one, b.read(path), fields.get(path, {})))
    return Compared(tensors=tensors, series=series, others=a.others)


def _size(item: TensorDifference) -> float:
    """How large a difference is; infinite when no number says so."""
    return item.largest if item.what == "values" and not isnan(item.largest) else inf
