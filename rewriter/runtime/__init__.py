"""Run an exported folder with numpy and onnxruntime alone.

model = rewriter.runtime.OnnxModel("out-onnx")
tokens = model.generate(input_ids, max_new_tokens=64)
"""

from rewriter.runtime.batch import Batch
from rewriter.runtime.encoder import OnnxEncoder
from rewriter.runtime.model import OnnxModel
from rewriter.runtime.sampling import Sampler
from rewriter.runtime.seq2seq import OnnxSeq2Seq

__all__ = ["Batch", "OnnxEncoder", "OnnxModel", "OnnxSeq2Seq", "Sampler"]
