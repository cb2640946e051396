"""Looks at gradients from outside: by lag, their decay, what a tape holds, checks."""
