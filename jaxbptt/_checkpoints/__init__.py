"""Stop and resume: states with tapes on disk."""
