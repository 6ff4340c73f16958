"""LitServe as its documentation writes it."""

import os
import sys
from pathlib import Path

import joblib
import litserve
import pandas as pd

MODEL = Path(os.environ["BENCH_MODEL"])


class Fraud(litserve.LitAPI):
    def setup(self, device):
        self.model = joblib.load(MODEL / "classifier.joblib")

    def decode_request(self, request):
        return pd.DataFrame(request["instances"])

    def predict(self, frame):
        return self.model.predict_proba(frame)[:, 1]

    def encode_response(self, scores):
        return {"predictions": scores.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Fraud(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
