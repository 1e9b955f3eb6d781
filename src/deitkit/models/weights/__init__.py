"""Weights from and to files: of deitkit, timm, transformers and the released DeiT."""
