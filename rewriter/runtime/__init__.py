"""Run an exported folder with numpy and onnxruntime alone.

model = rewriter.runtime.OnnxModel("out-onnx")
tokens = model.generate(input_ids, max_new_tokens=64)
"""

from rewriter.runtime.model import OnnxModel
from rewriter.runtime.sampling import Sampler

__all__ = ["OnnxModel", "Sampler"]
