"""Evaluations beside a training and after it: when, in which process, what is known of each attempt."""
