"""Reading and writing weights of deitkit, timm, transformers and the released DeiT."""
