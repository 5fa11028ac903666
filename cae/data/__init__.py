"""Readers, transforms and the deterministic sampler."""
