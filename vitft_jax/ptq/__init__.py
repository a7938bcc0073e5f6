"""Post-training quantisation as functions on the parameter tree: each stage is a file, `vitft_jax.quantize` runs them.

`recipe` says in which order, `options` what a command may ask for. `calibration` shows the float model training images, also
for training with static ranges.

A stage takes float parameters and what `observe` saw at the inputs of the linear layers, and changes the parameters so that
the integers that follow lose less. Layers go by path, such as 'blocks_0/attn/query'.
"""
