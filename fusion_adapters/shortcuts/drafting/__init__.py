"""Lossless drafts: text that a cheaper model writes ahead, checked in one pass."""
