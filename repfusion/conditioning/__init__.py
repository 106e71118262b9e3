"""Requests, noisy latents and noise level -> the condition of a denoiser: one file a method."""
