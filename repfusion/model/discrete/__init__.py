"""Models of discrete codes beside text-to-image: masked diffusion over text and codes, and autoregression."""
