"""Idempotent message consumers."""
