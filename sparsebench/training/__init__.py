"""Training: the loop, fine-tuning for methods, models from scratch."""
