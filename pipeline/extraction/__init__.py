"""Tars in, features in a store: the plan, the run and its workers."""
