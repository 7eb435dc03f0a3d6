"""Tables for the terminal and pictures of what a fusion reads."""

from .heatmap import draw_depth_map
from .tables import metrics_table, prediction_lines

__all__ = ["draw_depth_map", "metrics_table", "prediction_lines"]
