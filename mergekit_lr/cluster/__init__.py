"""A run whose units of work are tasks of a Ray cluster (docs/scaling.md). Only this room imports Ray, and only then."""
