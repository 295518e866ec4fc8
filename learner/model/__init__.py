"""The policy's forward pass: attention, LoRA layers, log-probabilities."""
