"""What a training loop stands on: DeepSpeed, averaged weights, exact resume, meters, ranks."""
