"""What a run leaves: its record and state, the machine it ran on, files written whole, W&B, the terminal."""
