"""Rectified flow: noise levels, interpolation and the sampler."""
