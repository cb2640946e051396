"""One step and its pullback, as flat programs."""
