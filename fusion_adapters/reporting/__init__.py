"""Tables for the terminal and pictures of what a fusion reads."""

from .card import model_card
from .heatmap import draw_depth_map
from .tables import budget_table, metrics_table, prediction_lines

__all__ = ["budget_table", "draw_depth_map", "metrics_table", "model_card", "prediction_lines"]
