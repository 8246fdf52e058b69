"""Validation: fixed windows of the held-out text, the same for every rung, summed in float64 over all ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from homelab_scaling.data.batches import document_ids, read_windows, validation_windows
from homelab_scaling.data.shards import Shards
from homelab_scaling.train.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One measurement of the held-out loss."""

    loss_nats: float
    """Mean over all target tokens."""
    loss_se_nats: float | None
    """Standard error over documents; None with fewer than two."""
    bpb: float | None
    """Bits per UTF-8 byte, by the held-out split's own tokens per byte; None where its bytes are unknown."""
    n_tokens: int
    n_documents: int


class Evaluator:
    """Measures a model on a fixed set of windows.

    Args:
        shards: the corpus.
        context_tokens: window length.
        n_tokens: size of the set (all of val.bin if it is smaller).
        rank: which of `world_size` interleaved parts this process measures.
        batch_seqs: windows per forward pass.
        sum_over_ranks: adds a float64 vector over all ranks, in place.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        context_tokens: int,
        n_tokens: int,
        rank: int,
        world_size: int,
        batch_seqs: int,
        device: torch.device,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.stream = shards.val
        self.context = context_tokens
        windows = validation_windows(len(shards.val), context_tokens, n_tokens)
        eot_id = shards.manifest.eot_id
        if eot_id is None:  # documents cannot be told apart: one document, and so no standard error
            documents = np.zeros((len(windows), context_tokens), dtype=np.int64)
        else:
            documents = document_ids(shards.val, windows, context_tokens, eot_id)
        # Numbered from 0 over the whole set, so that every rank's sums have the same length and meaning.
        _, renumbered = np.unique(documents, return_inverse=True)
        renumbered = renumbered.reshape(documents.shape)
        self.n_documents = int(renumbered.max()) + 1
        self.windows = windows[rank::world_size]
        self.most_windows = -(-len(windows) // world_size)
        """Of any rank: under FSDP all ranks make as many forward passes."""
        self.filler = windows[:1]
        self.documents = renumbered[rank::world_size]
        self.batch_seqs = min(batch_seqs, self.most_windows)
        self.device = device
        self.sum_over_ranks = sum_over_ranks
        split = shards.manifest.val
        self.bytes_per_token = split.n_bytes / split.n_tokens if split.n_bytes else None

    @torch.no_grad()
    def measure(self, model: LanguageModel) -> Validation:
        """The held-out loss of `model`, the same number on every rank."""
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, self.n_documents, dtype=torch.float64, device=self.device)
        size = self.batch_seqs
        for first in range(0, self.most_windows, size):
            ids = self.windows[first : first + size]
            # The last batch is filled up with its own windows again: one shape for all, so it is compiled once.
            window = read_windows(self.stream, np.resize(ids if len(ids) else self.filler, size), self.context)
            tokens = torch.from_numpy(window.astype(np.int64)).to(self.device)
            losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])[: len(ids)].double().flatten()
            owner = torch.from_numpy(self.documents[first : first + size].astype(np.int64).ravel())
            owner = owner.to(self.device)
            sums[0].index_add_(0, owner, losses)
            sums[1].index_add_(0, owner, torch.ones_like(losses))
        model.train(was_training)
        loss_by_document, tokens_by_document = self.sum_over_ranks(sums).cpu().numpy()
        return summarize(loss_by_document, tokens_by_document, self.bytes_per_token)


def summarize(
    loss_by_document: np.ndarray, tokens_by_document: np.ndarray, bytes_per_token: float | None
) -> Validation:
    """Mean, standard error and bits per byte from sums by document.

    The mean is a ratio of sums, and documents are the independent units: se^2 = n / (n - 1) * sum(e_d^2) / T^2 with
    e_d = S_d - mean * T_d.

    Source: Cochran, Sampling Techniques, eq. 6.13 (ratio estimator).
    """
    n, total = len(loss_by_document), float(tokens_by_document.sum())
    mean = float(loss_by_document.sum()) / total
    residual = loss_by_document - mean * tokens_by_document
    se = math.sqrt(n / (n - 1) * float(residual @ residual)) / total if n > 1 else None
    if se is not None and not math.isfinite(se):
        se = None
    return Validation(
        loss_nats=mean,
        loss_se_nats=se,
        bpb=mean / math.log(2) / bytes_per_token if bytes_per_token else None,
        n_tokens=int(total),
        n_documents=n,
    )
