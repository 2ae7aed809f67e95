"""Training: the `loop`, `finetune` for methods, `from_scratch` for every kind of model, the `work` context both get."""
