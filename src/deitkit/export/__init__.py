"""Exporting a trained model as an ONNX file, in float32 or in 8-bit integers, and measuring it beside the original."""
