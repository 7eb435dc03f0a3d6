"""The frozen model: its blocks, its layer states, its signature. Knows torch and transformers, not peft."""
