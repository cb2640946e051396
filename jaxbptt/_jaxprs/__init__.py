"""Evaluates and rewrites jaxprs, and writes loops: nothing here knows of time, carry or tape."""
