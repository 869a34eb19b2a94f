"""Values of a comparison, as `tl.comparison` hands them to its page: made up, of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tl.pages import thumbnail

BACKBONES = ("mobilenetv2_100", "resnet18.a1_in1k", "vit_small_patch16_224", "convnext_atto")
METHODS = ("linear_probe", "lp_ft", "full")
HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def _picture(rng: np.random.Generator) -> str:
    pixels = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return thumbnail(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC))


def _run(i: int, rng: np.random.Generator, varied: list[str]) -> dict[str, Any]:
    backbone, method = BACKBONES[i % 4], METHODS[i // 4 % 3]
    value = float(0.80 + 0.03 * (i % 4) + 0.02 * (i // 4 % 3) + rng.normal(0, 0.008))
    epochs = list(range(1, 25))
    curve = [round(float(value * (1 - np.exp(-e / 5)) + rng.normal(0, 0.006)), 4) for e in epochs]
    confidence = [0.05 + 0.1 * b for b in range(10)]
    choices = {
        "params.model.name": backbone,
        "params.finetune.name": method,
        "params.finetune.lr_ratio": float(3 + 2 * (i % 3)),
        "params.optim.lr": float(10 ** -(2 + i // 2 % 3)),
    }
    return {
        "id": f"{i:032x}",
        "name": f"flowers · {backbone} · {method} · {i:04x}",
        "status": "FINISHED",
        "url": f"http://127.0.0.1:5000/#/experiments/1/runs/{i:032x}" if i % 2 else None,
        "folder": f"runs/flowers-{i:04d}",
        "group": 0,
        "why_not": None,
        "value": value,
        "low": value - 0.03,
        "high": min(value + 0.025, 1.0),
        "metrics": {"acc": value, "f1_macro": value - 0.01, "loss": 1 - value, "top5": 0.99},
        "params": {name: choices[name] for name in varied},
        "tags": {"tl.method": method, "device": "cpu"},
        "seed": i // 12,
        "family": i % 12,
        "pareto": i % 12 in (0, 7, 11),
        "cost": {
            "fit_seconds": float(10 * (1 + i % 4) * (1 + i // 4 % 3) + i % 7),
            "total_seconds": float(20 * (1 + i % 4) * (1 + i // 4 % 3) + i % 7),
            "parameters": [2_200_000, 11_200_000, 21_700_000, 3_400_000][i % 4],
            "trainable_parameters": [6_405, 11_200_000, 21_700_000][i // 4 % 3],
            "ms_an_image": [3.1, 8.4, 30.2, 5.5][i % 4],
            "bytes": [9_000_000, 45_000_000, 87_000_000, 14_000_000][i % 4],
        },
        "curve": {
            "metric": "val/acc",
            "x": epochs,
            "y": curve,
            "marks": [{"x": 1, "phase": "head"}, {"x": 9, "phase": "all"}],
        },
        "reliability": {
            "confidence": confidence,
            "accuracy": [min(1.0, c * float(0.9 + 0.1 * rng.random())) for c in confidence],
            "images": [int(n) for n in rng.integers(5, 120, 10)],
        },
        "ece": 0.02 + 0.01 * (i % 5),
        "per_class": {"daisy": value, "tulip": value - 0.05},
    }


def _pair(best: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    difference = best["value"] - other["value"]
    shown = difference > 0.03
    words = (
        f"{best['name']} beats {other['name']} by {100 * difference:.1f} points"
        if shown
        else f"no difference can be shown; about {900:,} images would tell"
    )
    return {
        "a": best["id"],
        "b": other["id"],
        "images": 400,
        "difference": difference,
        "low": difference - 0.03,
        "high": difference + 0.03,
        "p": 0.001 if shown else 0.3,
        "p_adjusted": 0.004 if shown else 0.9,
        "only_a": 30,
        "only_b": 12,
        "images_needed": None if shown else 900,
        "verdict": "a" if shown else "none",
        "words": words,
    }


def comparison(count: int = 12, *, flips: int = 6, seed: int = 0) -> dict[str, Any]:
    """Values of `count` runs; from 12 on in families of the same settings with other seeds."""
    rng = np.random.default_rng(seed)
    varied = ["params.model.name", "params.finetune.name", "params.finetune.lr_ratio"]
    varied.append("params.optim.lr")
    runs = [_run(i, rng, varied) for i in range(count)]
    best = max(runs, key=lambda r: r["value"])
    ranked = sorted(runs, key=lambda r: -r["value"])
    families = []
    for f in range(min(12, count)):
        own = [r for r in runs if r["family"] == f]
        values = np.array([r["value"] for r in own])
        spread = float(values.std(ddof=1)) if len(own) > 1 else None
        half = 2.2 * spread / len(own) ** 0.5 if spread is not None else None
        families.append(
            {
                "name": f"{BACKBONES[f % 4]} · {METHODS[f // 4 % 3]}",
                "runs": [r["id"] for r in own],
                "seeds": [r["seed"] for r in own],
                "mean": float(values.mean()),
                "std": spread,
                "low": None if half is None else float(values.mean()) - half,
                "high": None if half is None else float(values.mean()) + half,
            }
        )
    second = ranked[1] if len(ranked) > 1 else None
    return {
        "title": "Comparison of flowers",
        "created": "2026-11-21T22:00:00+00:00",
        "experiment": "flowers",
        "filter": "params.model.name != 'x'",
        "store": "sqlite:///mlflow.db",
        "split": "test",
        "metric": "acc",
        "lower_is_better": False,
        "task": "single",
        "confidence": 0.95,
        "summary": [f"{best['name']} is the best of {count} runs on 400 test images."],
        "varied": varied,
        "best": best["id"],
        "baseline": None,
        "pair": [best["id"], second["id"]] if second else None,
        "groups": [
            {
                "fingerprint": "3f" * 32,
                "images": 400,
                "classes": ["daisy", "tulip"],
                "runs": [r["id"] for r in runs],
            }
        ],
        "runs": runs,
        "families": families,
        "reference": best["id"],
        "family_pairs": [
            {"a": 0, "b": f, "difference": 0.01, "low": -0.02, "high": 0.04, "verdict": "none"}
            for f in range(1, len(families))
        ],
        "pairs": [_pair(best, r) for r in ranked[1:]],
        "classes": [
            {"class": "daisy", "images": 60, "worst": 0.6, "best": 0.95, "a": 0.95, "b": 0.8},
            {"class": "tulip", "images": 40, "worst": 0.5, "best": 0.9, "a": 0.7, "b": 0.9},
        ]
        if second
        else [],
        "flips": [_flip(i, best, second, rng) for i in range(flips)] if second else [],
    }


def _flip(i: int, a: dict[str, Any], b: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    said = ("daisy", "tulip") if i % 2 else ("tulip", "daisy")
    return {
        "image": f"test/daisy/{i:04d}.jpg",
        "sha256": f"{i:064x}",
        "label": "daisy",
        "a": {"run": a["id"], "predicted": said[0], "score": 0.91},
        "b": {"run": b["id"], "predicted": said[1], "score": 0.55},
        "thumbnail": None if i == 3 else _picture(rng),
    }
