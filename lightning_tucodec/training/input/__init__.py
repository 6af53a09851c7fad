"""What a training reads: the plan of samples, shards, pre-coded patches."""
