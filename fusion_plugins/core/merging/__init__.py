"""Fine-tuned copies of one base model -> one model."""
