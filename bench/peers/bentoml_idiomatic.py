"""BentoML as its documentation writes it: batchable API, pydantic rows, pandas, scikit-learn wrapper."""

import os
from pathlib import Path

import bentoml
import joblib
import pandas as pd
from pydantic import create_model

MODEL = Path(os.environ["BENCH_MODEL"])
Application = create_model("Application", **{f"f{i}": (float, ...) for i in range(15)})


@bentoml.service(traffic={"timeout": 60}, workers=1)
class Idiomatic:
    def __init__(self) -> None:
        self.model = joblib.load(MODEL / "classifier.joblib")

    @bentoml.api(batchable=True, max_batch_size=1000)
    def predict(self, instances: list[Application]) -> list[float]:  # type: ignore[valid-type]
        frame = pd.DataFrame([row.model_dump() for row in instances])
        return self.model.predict_proba(frame)[:, 1].tolist()
