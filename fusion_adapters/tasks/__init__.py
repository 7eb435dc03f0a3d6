"""What is asked of a text: reading, encoding, scores, prediction. Knows transformers, not peft."""
