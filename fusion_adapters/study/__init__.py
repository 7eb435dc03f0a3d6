"""The comparison: methods x training sizes x seeds on one or more data sets, resumable, with statistics and figures."""

from .recipe import StudyRecipe, load_study
from .runner import run_study

__all__ = ["StudyRecipe", "load_study", "run_study"]
