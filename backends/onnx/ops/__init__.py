"""One file for each op of the dialect: what it becomes in ONNX. A new file here is found."""
