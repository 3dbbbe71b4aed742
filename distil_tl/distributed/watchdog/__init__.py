"""Watchdogs: a small process beside each rank ends it when another rank is dead or frozen."""
