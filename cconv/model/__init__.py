"""Model: graphs of named layers, run by the twins and counted layer by layer.

builtin.py  ->  graph.py  ->  layers.py            ->  passes.py          ->  run.py
(registry)      (data)        (the operator table)     (prune, fold, fuse)    (Model, load)
"""

from .builtin import model_names
from .graph import Graph, Layer, ModelCost, Node
from .run import Model, load

__all__ = ["Graph", "Layer", "Model", "ModelCost", "Node", "load", "model_names"]
