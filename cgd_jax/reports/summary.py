"""What a person reads at the end: the table of a run's metrics, and what it means."""

from ml_collections import ConfigDict

from cgd_jax.reports import collapse, tables
from cgd_jax.runtime import console


def log_results(config: ConfigDict, results: dict) -> None:
    """Prints the table of metrics, baselines first."""
    name = f"CGD {config.model.descriptors}, step {results['step']}"
    rows = {**results["baselines"], name: results["metrics"]}
    if "last step" in results:
        rows[f"  last step, {results['last step']['step']}"] = results["last step"]["metrics"]
    for label, measured in results.get("with options", {}).items():
        rows[f"  {label}"] = measured
    seen = tables.describe_classes(results["classes"]["tested"], results["classes"]["trained on"])
    console.log(f"\n{seen[0].upper()}{seen[1:]}, per cent:\n")
    console.log(tables.metrics_table(rows))
    if "chosen by" in results:
        console.log("\n" + console.fold(how_chosen(results)))
    low, high = results["metrics"]["confidence"]["recall@1"]
    console.log(
        f"\n95 % interval of R@1, bootstrapped over classes: {100 * low:.2f} to {100 * high:.2f}"
    )
    if said := no_better_than_before(results):
        console.log(console.fold(said))
    if "complementarity" in results:
        console.log(f"\n{tables.complementarity_text(results['complementarity'])}")
    norm = results["geometry"]["mean_embedding_norm"]
    if norm > collapse.ONE_POINT:
        text = (
            f"The mean of all test embeddings has norm {norm:.3f}: the embedding has nearly "
            f"collapsed to one point, and what it retrieves it owes to small differences."
        )
        console.log(console.fold(text))
    if results["metrics"]["excluded"]:
        console.log(f"{results['metrics']['excluded']} queries without a true match are left out.")


def how_chosen(results: dict) -> str:
    """Says by what the step was chosen that is reported."""
    step = results["step"]
    if results["chosen by"] == "validation classes":
        recall = 100 * results["validation"]["recall@1"]
        return (
            f"Step {step} was chosen by its R@1 of {recall:.2f} on validation classes; the test "
            f"classes were measured once, at the end."
        )
    if results["chosen by"] == "test classes":
        return f"Step {step} was chosen on the test classes themselves, which flatters it."
    return f"Step {step} is the last one; no step was chosen on the test classes."


def no_better_than_before(results: dict) -> str | None:
    """Says so if training did not beat the pretrained network beyond the interval."""
    before = {
        name: measured["recall@1"]
        for name, measured in results["baselines"].items()
        if name.startswith("pretrained")
    }
    low, _ = results["metrics"]["confidence"]["recall@1"]
    if not before or max(before.values()) < low:
        return None
    name = max(before, key=before.__getitem__)
    return (
        f"Training did not beat {name} (R@1 {100 * before[name]:.2f}) beyond the interval. "
        f"`cgd_jax serve IMAGES` searches with the pretrained network as it is."
    )
