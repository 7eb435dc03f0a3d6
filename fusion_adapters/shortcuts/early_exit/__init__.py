"""Early exit: a pass stops at the first layer that is sure."""
