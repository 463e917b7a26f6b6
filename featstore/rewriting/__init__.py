"""Stores made from stores: grown, merged, converted, quantised and exported."""
