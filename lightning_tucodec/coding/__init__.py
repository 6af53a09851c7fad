"""Bytes and exact integers."""
