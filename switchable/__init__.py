"""Switchable sparse-dense learning (SSD): one set of Transformer weights, two ways to multiply it."""
