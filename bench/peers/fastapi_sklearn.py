"""A plain FastAPI service over the scikit-learn wrappers, and the same with what a regulated service needs:
/predict uses the classifier, /explain CalibratedClassifierCV and LightGBM's own contributions."""

import os
from pathlib import Path

import joblib
import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel, create_model

MODEL = Path(os.environ["BENCH_MODEL"])
NAMES = [f"f{i}" for i in range(15)]
Application = create_model("Application", **dict.fromkeys(NAMES, (float, ...)))


class Request(BaseModel):
    instances: list[Application]  # type: ignore[valid-type]


app = FastAPI()
classifier = joblib.load(MODEL / "classifier.joblib")
calibrated = joblib.load(MODEL / "calibrated.joblib")


@app.post("/predict")
def predict(request: Request) -> dict:
    frame = pd.DataFrame([row.model_dump() for row in request.instances])
    scores = classifier.predict_proba(frame)[:, 1]
    return {"predictions": [{"fraud_probability": float(p), "prediction": bool(p >= 0.5)} for p in scores]}


@app.post("/explain")
def explain(request: Request) -> dict:
    frame = pd.DataFrame([row.model_dump() for row in request.instances])
    scores = calibrated.predict_proba(frame)[:, 1]
    contributions = classifier.booster_.predict(frame, pred_contrib=True)
    answers = []
    for p, row in zip(scores, contributions, strict=True):
        by_name = dict(zip(NAMES, row[:-1].tolist(), strict=True))
        top = sorted(by_name.items(), key=lambda item: -abs(item[1]))[:5]
        reasons = [{"feature": name, "contribution": value} for name, value in top]
        answers.append({"fraud_probability": float(p), "contributions": by_name, "reasons": reasons})
    return {"predictions": answers}
