"""Which learning rates, center and dimension? Chosen on validation classes, by Optuna."""

CONFIG = "configs/glyphs.py"
TRIALS = 40
# A list has the choices; a pair is the range of a number, which is drawn on a logarithmic scale.
SPACE = {
    "optimizer.learning_rate": (5e-4, 1e-2),
    "optimizer.fc_lr_scale": (0.05, 1.0),
    "model.fc_init": ["orthogonal", "lecun_normal"],
    "model.center": ["none", "mean", "direction"],
    "model.embedding_dim": [126, 252, 504],
}
