"""Whole runs: the recipes as users run them, beside what else there is for the same."""
