"""Model: graphs of named layers, run by the twins and counted layer by layer.

builtin.py (registry)   ->  graph.py  ->  layers.py            ->  passes.py          ->  run.py
onnx_format.py (files)      (data)        (the operator table)     (prune, fold, fuse)    (Model, load)
                                          rules.py, moves.py, folding.py
"""

from .builtin import model_names
from .graph import Constant, Graph, Layer, ModelCost, Node
from .run import Model, load

__all__ = ["Constant", "Graph", "Layer", "Model", "ModelCost", "Node", "load", "model_names"]
