"""What a run writes: files, its log, words on the screen, charts; and `page`, `report.html` from all of these."""

from vitft_jax.report.charts import heat_map
from vitft_jax.report.files import finite, optional, write_figure, write_json, write_text
from vitft_jax.report.log import MetricsLog
from vitft_jax.report.machine import cpu, environment
from vitft_jax.report.predictions import Predictions, predictions_table, read_predictions, write_predictions
from vitft_jax.report.screen import PLAIN_LINES, Screen, interval, line, print_calibration, print_results

__all__ = [
    "PLAIN_LINES",
    "MetricsLog",
    "Predictions",
    "Screen",
    "cpu",
    "environment",
    "finite",
    "heat_map",
    "interval",
    "line",
    "optional",
    "predictions_table",
    "print_calibration",
    "print_results",
    "read_predictions",
    "write_figure",
    "write_json",
    "write_predictions",
    "write_text",
]
