"""A compiler for pretrained transformers: capture, rewrite, check, save, serve.

    model = rewriter.rewrite("folder-or-hub-id", rewriter.Plan.from_yaml("plan.yaml"))
    model.save_pretrained("out")
    rewriter.export(model, "out-onnx", to="onnx")

Importing it registers the saved model type, so that
`AutoModelForCausalLM.from_pretrained("out")` works.
"""

from rewriter.capture import capture
from rewriter.errors import RewriterError
from rewriter.export import export
from rewriter.model import RewrittenModel, load
from rewriter.plan import Plan
from rewriter.rewrite import rewrite

__version__ = "0.1.0"
__all__ = ["Plan", "RewriterError", "RewrittenModel", "capture", "export", "load", "rewrite"]
