"""Suites that others publish, by their own prompt files and rules; docs/suites.md says how each number is
made.
"""
