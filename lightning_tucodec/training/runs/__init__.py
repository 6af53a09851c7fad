"""What a run is and what it leaves: its identity, folder, checkpoints, counters."""
