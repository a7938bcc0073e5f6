"""Fine-tune pretrained Vision Transformers on small, specialised image sets, and make the result small and fast."""
