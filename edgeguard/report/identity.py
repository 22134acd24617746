"""What an engine executes: which artifact, and which integer graph.

Artifacts of several targets, such as a TensorRT plan that was built on a board and ONNX Runtime's on a workstation, can hold
one integer graph: the same integers and so the same model, in other files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeguard.artifact import GRAPH

UNKNOWN = "unknown"
"""Where a server does not say what it executes."""


@dataclass(frozen=True)
class Executed:
    """SHA-256 of the artifact's manifest, and of its integer graph; each `UNKNOWN` where nobody says."""

    artifact: str
    graph: str

    @staticmethod
    def of(artifact: Mapping[str, Any]) -> Executed:
        """artifact: a report's block. Of a server what it says of itself or, where it says nothing, its twin."""
        own = Executed(artifact["sha256"], artifact["files"].get(GRAPH, UNKNOWN))
        claims = (artifact.get("remote") or {"claims": {}})["claims"]
        claimed, graph = claims.get("artifact_sha256"), claims.get("graph_sha256")
        if not isinstance(claimed, str):
            return own
        if isinstance(graph, str):
            return Executed(claimed, graph)
        return own if claimed == own.artifact else Executed(claimed, UNKNOWN)

    def is_model(self, other: Executed) -> bool:
        """Whether both are known to be one artifact or one integer graph."""
        return (self.artifact == other.artifact != UNKNOWN) or (self.graph == other.graph != UNKNOWN)

    def why_not(self, other: Executed) -> str:
        """Why two artifacts are not taken for one model."""
        if UNKNOWN in (self.graph, other.graph):
            return "it is not known of both which integer graph they hold"
        return "not of one integer graph"
