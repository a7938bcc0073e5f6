"""Quantisation-aware training of adapters: a fine-tuned model learns to make up for int8 products, for two epochs.

python -m vitft_jax.train --config configs/qat.py --config.data.path=IMAGES --config.model.pretrained=runs/lora

BUSI, ViT-S/14, bfloat16, 3 seeds, after LoRA of the same rank on query, key and value (docs/results.md): test accuracy 0.861
[0.853 to 0.865], AUROC 0.955 [0.949 to 0.960]; the LoRA runs have 0.855 [0.833 to 0.865] and 0.952 [0.943 to 0.959].

From weights that were not fine-tuned, give it the epochs and the rate of LoRA: --config.train.epochs=10 --config.train.lr=5e-4.
Over a base that is int8 in memory: the same and --config.quant.base=int8. To train every parameter, which on BUSI loses
points where adapters do not: --config.methods=quant --config.train.trainable=. --config.train.lr=1e-5. With fixed ranges of
activations, calibrated first: --config.quant.static=True. With attention in int8 too: --config.quant.attention=True.
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with int8 products, and LoRA on query, key and value at a rate that keeps what was fine-tuned."""
    config = default()
    config.methods = ("quant", "lora")
    config.lora.targets = "qkv"
    config.train.epochs = 2.0
    config.train.lr = 2e-4
    return config
