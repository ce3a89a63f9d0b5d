"""Which temperature τ and which smoothing ε of the auxiliary loss?"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "τ 0.5 ε 0.1"
VARIANTS = {
    f"τ {temperature} ε {smoothing}": {
        "loss.temperature": temperature,
        "loss.smoothing": smoothing,
    }
    for temperature in (0.1, 0.25, 0.5, 1.0)
    for smoothing in (0.0, 0.1, 0.2)
}
