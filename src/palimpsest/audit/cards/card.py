"""What a metric card says."""

from __future__ import annotations

from dataclasses import dataclass

from palimpsest.core.records import Better


@dataclass(frozen=True)
class MetricCard:
    """How to read one measurement.  Texts are whole sentences for a reader who has not read the paper."""

    name: str  # of the measurement
    title: str
    meaning: str
    direction: str
    range: tuple[float | None, float | None]  # lowest and highest possible value; None is open
    reference: str  # what to hold the number against
    # below this the interval is too wide to decide anything; 0: not known.  At 100, the 95% interval of a mean of
    # 0-to-100 scores reaches at most 10 points (1.96 * 50 / sqrt(100))
    needs_records: int
    source: str
    unit: str = ""
    needs: str = ""  # what must be given for the number to exist
    better: Better | None = None  # the way that `direction` puts in words; None: the measurement says it

    @property
    def range_text(self) -> str:
        low, high = self.range
        unit = f" {self.unit}" if self.unit else ""
        if low is None and high is None:
            return f"any number{unit}"
        if high is None:
            return f"{low:g} and up{unit}"
        if low is None:
            return f"up to {high:g}{unit}"
        return f"{low:g} to {high:g}{unit}"
