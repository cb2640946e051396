"""Influence balancing: Tallec & Ollivier, "Unbiasing Truncated Backpropagation Through Time", 2017.

The state goes s ← A s + θ b, with 10 positive and 13 negative entries in b.
"""

import numpy as np

UNITS = 23
WIRING = 0.5 * np.eye(UNITS) + 0.5 * np.eye(UNITS, k=1)
SIGNS = np.where(np.arange(UNITS) < 10, 1.0, -1.0)
