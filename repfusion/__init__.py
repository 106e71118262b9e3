"""RepFusion and UniFusion: text-to-image models conditioned by a frozen multimodal LLM that reads the noisy
latents.
"""
