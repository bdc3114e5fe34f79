"""Targets, methods, grids and their scores: every way to steer on one scoreboard."""
