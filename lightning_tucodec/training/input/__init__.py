"""The input of a training: the plan of samples, shards, pre-coded patches."""
