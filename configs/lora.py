"""LoRA on query and value, rank 8, and a new head.

python -m vitft_jax.train --config configs/lora.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

BUSI, ViT-S/14, 8 epochs, bfloat16, 3 seeds (docs/results.md): test accuracy 0.833 [0.808 to 0.846], AUROC 0.948 [0.942 to
0.956]; 149,763 parameters train.
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with LoRA."""
    config = default()
    config.methods = ("lora",)
    return config
