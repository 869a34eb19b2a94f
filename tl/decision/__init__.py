"""The decision table: from evidence to a plan, with reasons. Pure functions, no torch."""
