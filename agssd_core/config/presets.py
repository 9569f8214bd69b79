"""What a preset fills in: ``tiny`` for tests and phantoms, ``small``, ``base``."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "agssd": {
            "model": {
                "patch_size": 8,
                "width": 48,
                "depth": 2,
                "heads": 4,
                "pos_embed": "sincos",
                "drop_path": 0.0,
                "decoder": "transformer",
            },
            "cvac": {"global_size": [32, 32, 32], "local_size": [16, 16, 16], "n_local": 2},
            "cvaa": {"min_inner": 4},
            "head": {"prototypes": 128, "hidden": 256, "bottleneck": 64},
            "teacher": {"ema_momentum": 0.99},
        },
        "anaus": {
            "backbone": {"width": 16, "norm": "group"},
            "augment": {"size": 64},
            "regions": {"scales": [2, 4, 8, 16], "per_view": 8},
            "head": {
                "hidden_projector": 128,
                "projection": 64,
                "hidden_predictor": 128,
                "fpn": 32,
            },
            "optimiser": {"learning_rate": 0.3},
            "batch_size": 8,
        },
        "lpsam": {
            "image_size": 64,
            "regions": 4,
            "blocks": 2,
            "adapters": {"steps": 150},
            "engine": {"steps": 150},
        },
        "training": {"optimiser": {"learning_rate": 2e-3}},
        "data": {
            "spacing_mm": [3.0, 3.0, 3.0],
            "chunk": 32,
            "foreground_margin": 4,
            "frames": {"max_side": 160},
        },
    },
    "small": {},
    "base": {
        "agssd": {
            "model": {"width": 768, "depth": 12, "heads": 12},
            "head": {"prototypes": 8192},
        },
        "anaus": {"backbone": {"depth": 50}},
        "lpsam": {"architecture": "vit-b"},
    },
}
