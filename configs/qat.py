"""Quantisation-aware training: every parameter trains while the linear layers of the blocks multiply in int8.

python -m vitft_jax.train --config configs/qat.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

With adapters: --config.methods=quant,lora --config.train.trainable=^head. With adapters over a base that is int8 in memory:
the same and --config.quant.base=int8. With fixed ranges of activations, calibrated first: --config.quant.static=True. With
attention in int8 too: --config.quant.attention=True.
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with int8 products, everything trainable at a rate that keeps what was pretrained."""
    config = default()
    config.methods = ("quant",)
    config.train.trainable = "."
    config.train.lr = 3e-5
    return config
