"""Models that judge images, from local folders: detectors, colours by CLIP, questions by models that see."""
