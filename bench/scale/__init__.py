"""Large jobs: what they take in time and memory."""
