"""Images in; label maps, overlays and routes out: on PyTorch, on ONNX Runtime, in several processes."""
