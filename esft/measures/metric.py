"""The metrics that answers are scored by, by name; of each, more is better."""

from __future__ import annotations

from typing import Literal, get_args

MetricName = Literal["exact_match"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
