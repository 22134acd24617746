"""A local engine behind the Open Inference Protocol: what `edgeguard serve` runs. No torch; uvicorn speaks HTTP.

    options = ServeOptions(port=8000)
    with open_engine("runs/x") as engine:
        run(engine, Model.of("x", engine, options), options)

`answers` turns a request into images and logits into an answer, `worker` lets one thread have the engine, `app` is the
application, `connections` what uvicorn is told, `telemetry` logs and metrics.
"""

from edgeguard.serve.connections import listen, run
from edgeguard.serve.model import Model
from edgeguard.serve.options import ServeOptions

__all__ = ["Model", "ServeOptions", "listen", "run"]
