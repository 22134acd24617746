"""What attacks say about a model and its bit-widths: gradients, places, visibility, transfer. Needs torch.

The three analyses of the paper behind QADT-R (arXiv:2503.07058), and transfer matrices. The paper describes them in words;
the definitions here are ours, and `study.DEFINITIONS` prints them with every result.
"""

from edgeguard.analysis.study import PARTS, SCHEMA, AnalysisOptions, analyze

__all__ = ["PARTS", "SCHEMA", "AnalysisOptions", "analyze"]
