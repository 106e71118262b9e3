"""Representation autoencoder (RAE, arXiv 2510.11690): a frozen encoder, exact latent statistics, a trained
decoder.
"""
