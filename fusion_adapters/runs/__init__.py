"""A recipe becomes a run: load, attach, train, score, save, predict."""
