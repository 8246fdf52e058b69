"""A run's configuration in a few plain words, for trackers."""

from homelab_scaling.codec import stable_hash
from homelab_scaling.plan.counting import count_params
from homelab_scaling.specs import RunSpec


def describe_run(spec: RunSpec) -> dict[str, str | int | float | bool]:
    """What a tracker is told of a run's configuration, under the names that `homelab fit --from-...` looks for."""
    science, shape = spec.science, spec.science.shape
    start = {} if science.start is None else {"start": science.start}
    return {
        "run_id": spec.run_id,
        "ladder": spec.ladder,
        "rung": spec.rung,
        "family": "gpt2",
        "n_params": count_params(shape, science.n_vocab).n_params,
        "n_layer": shape.n_layer,
        "d_model": shape.d_model,
        "n_head": shape.n_head,
        "context_tokens": shape.context_tokens,
        "tied": shape.tied,
        "n_vocab": science.n_vocab,
        "data_id": stable_hash(
            [science.tokenizer_hash, science.train_fingerprint, science.val_fingerprint], n_chars=12
        ),
        "batch_tokens_global": science.batch_tokens_global,
        "schedule": science.schedule.name,
        "lr_peak": science.schedule.lr_peak,
        "optimizer": science.optim.name,
        "precision": science.precision,
        "seed": science.seed,
        **start,
    }
