"""Fine-tuning of the converted K/V layers, or of any other part of a model."""
