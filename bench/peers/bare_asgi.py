"""The least a Python server can do for the same score: parse JSON, call the booster, look the calibration up.

No validation, no errors, no request ids, no metrics."""

import json
import os
from pathlib import Path

import lightgbm
import numpy as np
import orjson

MODEL = Path(os.environ["BENCH_MODEL"])
NAMES = [f"f{i}" for i in range(15)]
booster = lightgbm.Booster(model_file=MODEL / "booster.txt")
knots = json.loads((MODEL / "calibrator.json").read_text())
knots_x, knots_y = np.array(knots["x"]), np.array(knots["y"])


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    rows = orjson.loads(body)["instances"]
    X = np.array([[row[name] for name in NAMES] for row in rows])
    margins = booster.predict(X, raw_score=True, num_threads=1)
    scores = np.interp(margins, knots_x, knots_y).tolist()
    answer = orjson.dumps({"predictions": [{"fraud_probability": p, "prediction": p >= 0.5} for p in scores]})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
