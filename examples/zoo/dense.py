"""Train the base, its three experts and the joint fine-tune."""

from __future__ import annotations

from zoo import WORK, card, models, runs
from zoo.sources import DOMAINS
from zoo.text import training_tokens
from zoo.train import fit


def build(name: str) -> None:
    """Train the dense model ``name`` and write its folder, card and (for fine-tunes) Adam's moments.

    Fine-tunes start from the base as it is on disk, bfloat16, so that a task vector is exactly the difference
    of two files.
    """
    run = runs.DENSE[name]
    model = models.new_base(run.seed) if name == "base" else models.load_base()
    data = {domain: training_tokens(domain) for domain in DOMAINS}
    checkpoint = WORK / "checkpoints" / f"{name}.pt"
    trained = fit(model, run, data, checkpoint)
    folder = WORK / name
    # The base is written in two shards so that the examples show sharded reading.
    models.write_folder(model, folder, shard_size="1950KB" if name == "base" else "5GB")
    if name != "base":
        models.write_moments(trained, run, folder)
    card.write_dense(folder, run, models.losses(models.load(folder)))
    checkpoint.unlink(missing_ok=True)
