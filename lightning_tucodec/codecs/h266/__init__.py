"""H.266 with a learned post-filter."""
