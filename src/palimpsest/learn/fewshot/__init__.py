"""Learners of few-shot episodes."""
