"""A server process around an engine that does what a test wants. Argument: JSON of options; prints the URL of its model."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np
from serving import TOY_CLASSES, TOY_SHAPE, toy_logits

from edgeguard.errors import EngineError
from edgeguard.serve import Model, ServeOptions, listen, run
from edgeguard.targets import BaseEngine


class Toy(BaseEngine):
    """Refuses to be called twice at a time. delay: seconds of each call. hang, fail: of images whose first pixel is 255.

    fail: `error` is an EngineError, `bug` something that nobody foresaw, `nan` logits that are none.
    """

    name = "toy"

    def __init__(self, delay: float = 0.0, hang: bool = False, fail: str = "", name: str = "toy") -> None:
        super().__init__(TOY_SHAPE, TOY_CLASSES)
        self.delay, self.hang, self.fail, self.name = delay, hang, fail, name
        self._lock = threading.Lock()

    def _logits(self, images: Any) -> Any:
        if not self._lock.acquire(blocking=False):
            raise EngineError("two calls at a time")
        try:
            time.sleep(self.delay)
            if (images[:, 0, 0, 0] == 255).any():
                while self.hang:
                    time.sleep(3600)
                if self.fail == "error":
                    raise EngineError("the device went away")
                if self.fail == "bug":
                    raise ZeroDivisionError("secret details")
                if self.fail == "nan":
                    return np.full((len(images), TOY_CLASSES), np.nan, np.float32)
            return toy_logits(images)
        finally:
            self._lock.release()


settings = json.loads(sys.argv[1])
engine = Toy(**{key: settings.pop(key) for key in ("delay", "hang", "fail", "name") if key in settings})
options = ServeOptions(**{"port": 0, **settings})
model = Model.of("toy", engine, options)
listening, root = listen(options)
print(f"{root}/v2/models/toy", flush=True)
ended = run(engine, model, options, listening)
sys.stderr.flush()
os._exit(0 if ended else 3)
