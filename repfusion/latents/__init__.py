"""Latent spaces: frozen encoders, exact statistics, and decoders back to pixels (RAE, arXiv 2510.11690;
VAEs).
"""
