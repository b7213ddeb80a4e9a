"""Floor 4: ModelConfig, the one Transformer, the loaders and the names of models."""
